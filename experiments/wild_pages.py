"""Pages that look like other people's, drawn at random: `render_mixed_page` with wild=1.

Titles, rules (solid, dashed, dotted, double), grids, frames, boxes, bars, windows with menus and
buttons, dotted leaders, capitals, sizes of 11 to 32 pixels, columns on the right or in the middle,
keys above their values, and values as forms have them: dates, amounts, measures, e-mails, names.

Rules and leaders are not text; all the rest is transcribed. A key is asked for as it is printed; on
a quarter of the pages in natural case ("Due Date"), whatever is printed. The answer is always as
printed.
"""

import random
import string
from dataclasses import dataclass, field

from PIL import ImageDraw

from experiments.pages import (COLUMNS, ITEMS, KEYS, PROSE, SHOPS, SIGNS, Page, background_pixels,
                               draw_word, load_font, random_colors, random_letters, random_price,
                               random_short, random_value, random_word, render_page, worn)

# Names in natural case; "_" stands for a space.
MORE_KEYS = """Invoice_Number Invoice_No Invoice_Date Due_Date Order_Number Order_No Order_Date
Customer_No Customer_Name Address Subtotal VAT Change Cash Tip Table Server Guests Check-in
Check-out Departure Arrival Boarding Terminal Allergies Ingredients Best_Before Net_Weight
Gross_Weight Use_By Storage Serving_Size Calories Fat Protein Sugar Salt Date_of_Birth Birthday
First_Name Last_Name Full_Name Nickname Gender Nationality Passport_No Phone_Number Mobile Fax
E-mail Website Post_Code Zip_Code Town County Region Department Position Employee Manager Supervisor
Shift Overtime Net_Pay Gross_Pay Bank IBAN Account_No Reference Ref_No Payment Payment_Method
Paid_By Card_No Approval Cashier Register Receipt_No Shop Store_No Sender Recipient Ship_To Bill_To
Ship_Date Tracking_No Delivery Delivery_Date Pickup Contents Pieces Length Width Depth Volume_No
Material Brand Article Article_No Part_No Serial_No Model_No Batch_No Lot_No Power Voltage Current
Frequency Capacity Temperature Pressure Speed Distance Duration Start_Date End_Date Start_Time
End_Time Opening_Hours Location Building Floor Room_No Seat_No Row Section Event Venue Doors_Open
Admission Valid_Until Valid_From Issued Expires Member_Since Member_No Points User Username Password
Login Language Currency Time_Zone Priority Severity Category Subject Project Task Owner Assignee
Deadline Progress Budget Cost Hours_Worked Signed_By Approved_By Checked_By Symptoms Diagnosis
Blood_Type Blood_Pressure Pulse Next_Visit Insurance Policy_No Claim_No License_No Mileage Fuel
Engine Colour Year Warranty Made_In Supplier Vendor Contact Comments Remarks Notes Purpose
Destination Via Track Coach Class_of_Travel Fare Booking_No Booking_Ref Confirmation Nights Adults
Children Rate_per_Night Total_Due Amount_Due Amount_Paid Balance_Due Previous_Balance Meter_Reading
Consumption Tariff Tax_Rate Net_Amount Service_Charge Shipping Handling""".split()
MORE_ITEMS = """Olive_Oil Green_Tea Black_Tea Hot_Chocolate Espresso Latte Cappuccino Mineral_Water
Orange_Juice Apple_Pie Ice_Cream Tomato_Soup Garlic_Bread Side_Salad Fish_and_Chips Fried_Rice
Spring_Roll Noodles Dumplings Sushi Taco Burrito Nachos Steak Pork_Chop Roast_Beef Ham Bacon Sausage
Eggs Omelette Pancakes Waffle Muffin Croissant Bagel Donut Brownie Honey Jam Yogurt Cream Flour Oats
Cereal Salt Pepper Vinegar Mustard Ketchup Garlic Onion Onions Potato Potatoes Tomato Tomatoes
Carrots Cabbage Spinach Lettuce Cucumber Mushrooms Pumpkin Corn Peas Lentils Grapes Pears Peach
Plums Cherries Mango Melon Kiwi Lime Berries Almonds Walnuts Peanuts Raisins Dates Chips Crackers
Chocolate Candy Gum Shampoo Toothpaste Toothbrush Razor Tissues Toilet_Roll Sponge Detergent Bleach
Bin_Bags Foil Napkins Cups Plates Forks Spoons Knife Bowl Mug Glass Kettle Toaster Pan Pot Vase
Mirror Clock Pillow Blanket Sheets Curtain Rug Chair Desk Shelf Sofa Table Bench Stool Mattress
Hammer Screws Bolts Nuts Drill Saw Pliers Wrench Ladder Hose Shovel Rake Seeds Soil Fertilizer
Gloves_L Light_Bulb USB_Cable Mouse Keyboard Monitor Printer Toner Stapler Folder Envelope Notebook
Marker Eraser Ruler Scissors Calendar Backpack Wallet Belt Tie Jacket Coat Sweater Jeans T-Shirt
Dress Skirt Shorts Boots Sandals Sneakers Umbrella Watch Ring Necklace Doll Puzzle Ball Kite Bicycle
Helmet Tire Oil_Change Car_Wash Haircut Repair Labor Delivery_Fee""".split()
MORE_COLUMNS = """Amount Color Date Day Time Status Grade Age City Country Unit_Price Quantity Level
Room Left Length Width Height Power Speed Distance Area Result Team Wins Losses Mon Tue Wed Thu Fri
Sat Sun Jan Feb Mar Apr May Jun Jul Aug Sep Q1 Q2 Q3 Q4 Phone Gate Start End Min Max Mean Target
Actual Change Rating Votes Type Model Discount Aisle Due Paid Balance VAT""".split()
SUMS = "Subtotal Discount Tax VAT Service Total Tip Deposit Cash Change".split()
CORNERS = "Product Name Article Description Person Place Team City Part Service Food No".split()
FIRST_NAMES = """Anna Ben Carla David Emma Felix Grace Hugo Ines Jack Karen Liam Maria Noah Olga
Paul Rosa Sam Tina Victor Wendy Yusuf Zoe""".split()
LAST_NAMES = """Smith O'Brien Garcia Miller Novak Rossi Tanaka Keller Brown Jones Dubois Khan Larsen
Moreau Nguyen Patel Quinn Silva Weber Young McKay Lopez Fischer Martin Wilson""".split()
CITIES = """London Berlin Paris Madrid Oslo Rome Vienna Dublin Prague Boston Denver Austin Seattle
Tokyo Osaka Sydney Lima Cairo Geneva Porto Leeds York Bergen""".split()
STREETS = "Main Oak Park High Mill Church Lake Hill River Station Elm King Queen Bridge".split()
TITLES = """Sales_Receipt Order_Form Registration_Form Price_List Weekly_Report Time_Sheet
Packing_List Delivery_Note Boarding_Pass Stock_List Menu Our_Prices Patient_Record Job_Card
Class_List Summary Statement Overview Application_Form Visitor_Pass Settings Details Contact_Us
Results Schedule Inventory Tax_Invoice Quotation Purchase_Order Guest_Check Medical_Report Sign_In
New_Account Profile Membership Shipping_Label Test_Report Work_Order Expenses Timetable
Booking""".split()
HEADINGS = """NOTICE WARNING CAUTION DANGER ATTENTION PLEASE_NOTE OPENING_HOURS EXIT NO_ENTRY
NO_PARKING NO_SMOKING PRIVATE STAFF_ONLY WET_FLOOR FIRE_EXIT Welcome Sale Information Open Closed
Please_Ring Reception Lost_&_Found For_Rent Push Pull Out_of_Order Mind_the_Step
Speed_Limit""".split()
PHRASES = """Keep this door closed.|Please wait here!|Authorized personnel only|Do not touch|
Beware of the dog|Keep out of reach of children.|Store in a cool, dry place.|
Shake well before use.|Thank you!|Thank you for your visit!|Please come again|Have a nice day!|
Follow us: @{w}|Call {t}|Tel. {t}|Visit www.{w}.com|Made in {C}|Contains: nuts, milk & soy|
May contain traces of {w}.|Mon - Fri {H}:{i} - {h}:{i}|Sat & Sun closed|Ask for {F} {L}|
Room {n}, floor {s}|Up to {n}% off!|Buy {s}, get {s} free|All prices incl. {n}% VAT|
No cash (cards only)|Item "{w}" is sold out.|Return within {n} days.|Fragile - handle with care|
Use by {d}.{m}.{Y}|Max. {n} persons|Max. {n} kg|{C}, {d} {M} {Y}|Dear {F},|Best regards, {F} {L}|
P.S. {w} & {w}|Attn: {F} {L}|"{w} {w}," said {F}.|Error ~~~: {w} not found!|
Save changes to "{w}"?|Page {s} of {n}|{n} items selected|Step {s}: {w}|Entrance: {n} {S} St.|
Height limit: {s}.~ m|Parking for {w} only|Terms & conditions apply.|{S} St. {n}, {C}|
Platform {s} (track {n})|Gate closes at {H}:{i}.|Next stop: {S} St.
""".replace("\n", "").split("|")
VALUES = """{Y}-{m}-{d}|{d}.{m}.{Y}|{m}/{d}/{y}|{d} {M} {Y}|{M} {d}, {Y}|{w}@{w}.com|
{f}.{w}@{w}.org|+~~ ~~ ~~~~~~~|~~~-~~~~|(~~~) ~~~-~~~~|{t}|{p}|{p}|{s},~~~.~~|${p}|${s},~~~.~~|
EUR {p}|{p} EUR|USD ~~~.~~|-{p}|{s}.~ kg|~~~ g|~~~ ml|{s} cm|{n} mm|{n} x {n} cm|{s}.~ l|{n} km/h|
~~ C|{n} W|~~~ V|{n}%|{s}.~%|{H}:{i}|{s}:{i} pm|{s}:{i} am|{H}:{i} - {h}:{i}|^~~~|^-~~~~|
^^^/{Y}/~~|#~~~~|^^~~ ~~~|^^-~~^|~~~~-~~~~-~~~~|~~~~~~~~|~~~|~~|~|{n} {S} St.|{S} Road {n}|
{n} {S} Ave|{C}|{C}, {n}|{F} {L}|{f1}. {L}|{L}, {F}|Dr. {L}|Mr. {f1}. {L}|{w}|{w}|{W}|{W} {W}|
{W} & {W}|{W}, {w}|yes|no|{W} ({w})|www.{w}.com|{s}/{n}|No. {n}|{s}:~~.~|v{s}.~.~|**** ~~~~|
~~~~ {C}|{s} x {p}|{n} h {i} min
""".replace("\n", "").split("|")

RULES = ("solid", "solid", "dashed", "dotted", "double")
GRIDS = ("none", "none", "none", "none", "all", "all", "rows", "columns", "outer")
FILLS = ((40, 40, 40), (160, 30, 30), (20, 110, 50), (30, 60, 160), (110, 40, 130), (90, 90, 90))


@dataclass
class Sheet:
    """A page that is drawn from top to bottom, and what all its parts have in common."""
    page: Page
    draw: ImageDraw.ImageDraw
    rng: random.Random
    file: str           # the font's, None for the built-in one
    size: int
    ink: tuple
    ground: tuple
    area: list          # [x0, y0, x1, y1]: what is still free
    extra: int          # pixels between lines
    space: float        # between words, in spaces
    case: str           # of keys, items and columns: "natural", "upper" or "lower"
    colon: str          # after keys
    as_printed: bool    # keys are asked for in the case that is printed, not the natural one
    rule: str           # one of RULES
    faint: tuple        # colour of rules, grids and frames
    taken: set = field(default_factory=set)      # names on the page, in small letters

    def chance(self, share):
        return self.rng.random() < share

    def font(self, scale=1.0):
        return load_font(max(11, round(self.size * scale)), self.file)

    def length(self, text, font=None):
        font = font or self.font()
        words = text.split(" ")
        return sum(map(font.getlength, words)) + (len(words) - 1) * self.gap(font)

    def gap(self, font):
        return font.getlength(" ") * self.space

    def cased(self, name):
        return {"upper": name.upper(), "lower": name.lower()}.get(self.case, name)

    def asked(self, name):
        return self.cased(name) if self.as_printed else name

    def names(self, *lists, count):
        """Names from some lists that are not on the page yet, in natural case."""
        found = []
        among = [*dict.fromkeys(sum(lists, []))]
        for name in self.rng.sample(among, min(3 * count, len(among))):
            name = name.replace("_", " ")
            if name.lower() not in self.taken and len(found) < count:
                self.taken.add(name.lower())
                found.append(name)
        return found


def wild_value(rng):
    """A value as forms have them: dates, amounts, measures, names, addresses, codes, times."""
    if rng.random() < 0.2:
        return random_value(rng)
    return filled_in(rng, rng.choice(VALUES))


def filled_in(rng, pattern):
    """A pattern of PHRASES or VALUES, filled in at random: ~ is a digit, ^ a capital letter."""
    def word():
        return (rng.choice(PROSE + [i.lower() for i in ITEMS]) if rng.random() < 0.4 else
                random_letters(rng, string.ascii_lowercase, 3, 8))
    first = rng.choice(FIRST_NAMES)
    text = pattern.format(
        Y=rng.randint(1950, 2039), y=f"{rng.randint(0, 39):02d}", m=f"{rng.randint(1, 12):02d}",
        d=f"{rng.randint(1, 28):02d}", H=f"{rng.randint(5, 12):02d}", h=rng.randint(13, 23),
        i=f"{rng.randint(0, 59):02d}", s=rng.randint(1, 12), n=rng.randint(10, 250),
        p=random_price(rng), w=word(), W=word().capitalize(), F=first, f=first.lower(), f1=first[0],
        L=rng.choice(LAST_NAMES), C=rng.choice(CITIES), S=rng.choice(STREETS),
        M=rng.choice("January Feb March Apr May June July Aug Sept October Nov December".split()),
        t=rng.choice(["+~~ ~~ ~~~~~~", "0~~ ~~~~~~", "555-~~~~", "(~~~) ~~~-~~~~"]))
    text = "".join(rng.choice(string.digits) if c == "~" else c for c in text)
    return "".join(rng.choice(string.ascii_uppercase) if c == "^" else c for c in text)


def draw_rule(sheet, x0, x1, y, style=None):
    """A level rule."""
    style, color = style or sheet.rule, sheet.faint
    on, step = {"dashed": (4, 7), "dotted": (1, 3)}.get(style, (10 ** 4, 10 ** 4))
    for line in (y - 1, y + 1) if style == "double" else (y,):
        for x in range(round(x0), round(x1), step):
            sheet.draw.line((x, line, min(x + on - 1, round(x1)), line), fill=color)


def put(sheet, cells, scale=1.0, ink=None, fill=None, edges=None):
    """Draws one line of cells (text, x0, x1, align), left to right, on a bar of colour `fill`
    between two `edges`. Returns its top and bottom, None if there is no room."""
    font = sheet.font(scale)
    height = sum(font.getmetrics()) + sheet.extra
    left, top, right, bottom = sheet.area
    cells = [cell for cell in cells if cell[0]]
    if top + height > bottom or any(
            sheet.length(text, font) > x1 - x0 + 1 for text, x0, x1, _ in cells):
        return None
    if fill:
        x0, x1 = edges or (left, right)
        sheet.draw.rectangle((x0, top, x1, top + height), fill=fill)
    line = []
    for text, x0, x1, align in cells:
        slack = x1 - x0 - sheet.length(text, font)
        x = x0 + slack * {"left": 0, "center": 0.5, "right": 1}[align]
        for word in text.split(" "):
            line.append(draw_word(sheet.draw, word, round(x), top + sheet.extra // 2, font,
                                  ink or sheet.ink))
            x += font.getlength(word) + sheet.gap(font)
    sheet.area[1] += height
    if line:
        sheet.page.lines.append(line)
    return top, top + height


def put_text(sheet, text, align="left", scale=1.0, **bar):
    """Draws as many of a text's words on one line as fit. Returns as put does."""
    x0, _, x1, _ = sheet.area
    words = text.split(" ")
    while words and sheet.length(" ".join(words), sheet.font(scale)) > x1 - x0 - 4:
        words.pop()
    return put(sheet, [(" ".join(words), x0 + 2, x1 - 2, align)], scale, **bar) if words else None


def put_title(sheet, text, largest=1.6):
    """A title: larger, in the middle or on the left, on a bar, over a rule, or plain."""
    rng = sheet.rng
    if text.lower() in sheet.taken:
        return
    scale = rng.choice([1.0, 1.0, rng.uniform(1.0, max(1.0, largest))])
    while scale > 1 and sheet.length(text, sheet.font(scale)) > sheet.area[2] - sheet.area[0] - 4:
        scale = max(1.0, scale - 0.1)
    text = text.upper() if sheet.chance(0.35) else text
    bar = dict(ink=(255, 255, 255), fill=rng.choice(FILLS)) if sheet.chance(0.2) else {}
    if put_text(sheet, text, rng.choice(["center", "left"]), scale, **bar):
        sheet.taken.add(text.lower())
        if sheet.chance(0.35) and not bar:
            draw_rule(sheet, sheet.area[0], sheet.area[2], sheet.area[1])
        sheet.area[1] += rng.choice([1, 2, 4, 8])


def column_spans(sheet, rows):
    """[(x0, x1), ...] of columns that hold all rows' cells, with gaps drawn at random, or None."""
    rng, (left, _, right, _) = sheet.rng, sheet.area
    widths = [max(sheet.length(row[i]) for row in rows) for i in range(len(rows[0]))]
    room, gaps = right - left - 10 - sum(widths), len(widths) - 1
    least = 0.5 * sheet.size + 4
    if room < least * gaps:
        return None
    widest = room / max(1, gaps)
    gap = rng.choice([widest, rng.uniform(least, max(least, min(widest, 5 * sheet.size)))])
    gap *= gaps > 0
    x = left + 5 + rng.choice([0, 0, 0.5, rng.random()]) * (room - gap * gaps)
    spans = []
    for width in widths:
        spans.append((x, x + width))
        x += width + gap
    return spans


def put_grid(sheet, rows, aligns, header=False, sums=0, boxed=False, plain=False):
    """Draws rows of cells in columns, with or without rules, a grid, bars, leaders and boxes.
    header: the first row has the columns' names; sums: so many last rows are sums; boxed: the last
    column's cells may stand in boxes; plain: keys above values. Returns the number of rows."""
    rng, spans = sheet.rng, column_spans(sheet, rows)
    while not spans and sheet.size > 12:
        sheet.size -= 1
        spans = column_spans(sheet, rows)
    if not spans:
        return 0
    grid = "none" if plain else rng.choice(GRIDS)
    x0, x1 = spans[0][0] - 4, spans[-1][1] + 4
    if grid == "none" and sheet.chance(0.5):
        x0, x1 = sheet.area[0], sheet.area[2]
    bar = rng.choice(FILLS) if header and sheet.chance(0.25) else None
    zebra = tuple((9 * a + b) // 10 for a, b in zip(sheet.ground, sheet.ink))
    zebra = zebra if sheet.chance(0.12) and not plain else None
    leader = not plain and not header and len(spans) == 2 and grid == "none" and sheet.chance(0.3)
    under_header, over_sums = header and sheet.chance(0.65), sums and sheet.chance(0.6)
    boxes = boxed and grid == "none" and not leader and sheet.chance(0.2)
    top, bottoms, between = sheet.area[1], [], rng.choice([0, 4, 8, sheet.size])
    for i, row in enumerate(rows):
        look = dict(ink=(255, 255, 255), fill=bar) if bar and i == 0 else \
            dict(fill=zebra) if zebra and i % 2 else {}
        cells = [(text, *span, align) for text, span, align in zip(row, spans, aligns)]
        if over_sums and i == len(rows) - sums and i:
            draw_rule(sheet, x0, x1, sheet.area[1])
        place = put(sheet, cells, edges=(x0, x1), **look)
        if not place:
            break
        bottoms.append(place[1])
        if plain and i % 2:
            sheet.area[1] += between
        if leader:
            value = sheet.page.lines[-1][-len(row[1].split(" "))]
            start, end = spans[0][0] + sheet.length(row[0]) + 4, value.box[0] - 4
            if aligns[0] == "left" and end - start > 24:
                base = place[1] - sheet.extra // 2 - sheet.size // 5
                draw_rule(sheet, start, end, base, "dotted")
        if boxes:
            sheet.draw.rectangle((spans[-1][0] - 3, place[0] + 1, x1, place[1] - 1),
                                 outline=sheet.faint)
        if under_header and i == 0 and grid in ("none", "outer", "columns"):
            draw_rule(sheet, x0, x1, place[1])
    if bottoms:
        draw_grid(sheet, grid, x0, x1, spans, top, bottoms)
        sheet.area[1] += rng.choice([1, 3, 6, 10])
    return len(bottoms)


def draw_grid(sheet, grid, x0, x1, spans, top, bottoms):
    """The lines of a grid around cells that have been drawn."""
    style = "solid" if grid == "all" else sheet.rule
    if grid in ("all", "rows"):
        for y in [top, *bottoms] if grid == "all" else bottoms[:-1]:
            draw_rule(sheet, x0, x1, y, style)
    if grid in ("all", "columns"):
        for (_, a), (b, _) in zip(spans, spans[1:]):
            sheet.draw.line(((a + b) / 2, top, (a + b) / 2, bottoms[-1]), fill=sheet.faint)
    if grid in ("all", "outer"):
        sheet.draw.rectangle((x0, top, x1, bottoms[-1]), outline=sheet.faint)


def wild_pairs(sheet, count):
    """`count` keys with values: beside them, at the right edge, above them, or two pairs a row."""
    rng = sheet.rng
    pairs = [(key, wild_value(rng)) for key in sheet.names(KEYS, MORE_KEYS, count=count)]
    room = sheet.area[2] - sheet.area[0] - sheet.size - 16
    pairs = [(k, v) for k, v in pairs
             if sheet.length(sheet.cased(k)) + sheet.length(v) + 8 < room]
    texts = [(sheet.cased(key) + sheet.colon, value) for key, value in pairs]
    layout = rng.choice(["column"] * 4 + ["right", "after", "above", "above", "two", "two"])
    if layout in ("above", "two"):
        side = 2 if layout == "two" else rng.choice([1, 2, 2, 3])
        groups = [texts[i:i + side] for i in range(0, len(texts) - side + 1, side)]
        rows = [sum(map(list, group), []) for group in groups] if layout == "two" else \
            [[pair[i] for pair in group] for group in groups for i in (0, 1)]
        per_row = side if layout == "two" else side / 2
        if rows and column_spans(sheet, rows):
            drawn = put_grid(sheet, rows, ["left"] * len(rows[0]), plain=layout == "above")
            done = int(drawn * per_row) if layout == "two" else drawn // 2 * side
            return ask(sheet, pairs[:done])
        layout = "column"
    if layout == "after" and sheet.colon:
        for (key, value), pair in zip(texts, pairs):
            x0, _, x1, _ = sheet.area
            if not put(sheet, [(key + " " + value, x0 + 3, x1, "left")]):
                return
            ask(sheet, [pair])
        return
    while len(texts) > 1 and not column_spans(sheet, texts):
        longest = max(range(len(texts)), key=lambda i: max(map(len, texts[i])))
        del texts[longest], pairs[longest]
    if texts:
        aligns = [rng.choice(["left", "left", "left", "right"]),
                  "right" if layout == "right" else "left"]
        ask(sheet, pairs[:put_grid(sheet, texts, aligns, boxed=True)])


def ask(sheet, pairs):
    sheet.page.questions += [(sheet.asked(key), value) for key, value in pairs]


def wild_phrase(sheet):
    """A line of text: a set phrase, or words with punctuation, now and then in capitals."""
    rng = sheet.rng
    if sheet.chance(0.5):
        text = filled_in(rng, rng.choice(PHRASES))
    else:
        words = [random_word(rng) if sheet.chance(0.2) else rng.choice(PROSE) for _ in range(14)]
        for i in range(len(words)):
            mark = rng.choice(["{}"] * 12 + ["{},", "{},", "{}.", "{}:", "{}!", "{}?", "({})",
                                             '"{}"', "{};", "'{}'", "{} &", "- {}"])
            words[i] = mark.format(words[i].capitalize() if sheet.chance(0.2) else words[i])
        text = " ".join(words)
    return text.upper() if sheet.case == "upper" and sheet.chance(0.7) else text


def wild_form(sheet):
    if sheet.chance(0.6):
        put_title(sheet, title_text(sheet.rng))
    if sheet.chance(0.2):
        put_text(sheet, wild_phrase(sheet))
    wild_pairs(sheet, sheet.rng.randint(2, 9))
    if sheet.chance(0.4):
        if sheet.chance(0.5):
            put_title(sheet, title_text(sheet.rng), 1.2)
        wild_pairs(sheet, sheet.rng.randint(2, 8))
    if sheet.chance(0.3):
        put_text(sheet, wild_phrase(sheet), sheet.rng.choice(["left", "center"]))


def title_text(rng):
    return rng.choice(TITLES).replace("_", " ")


def wild_receipt(sheet):
    """A shop's header, items with prices and perhaps counts, sums, what was paid, a greeting."""
    rng = sheet.rng
    put_title(sheet, " ".join(rng.sample(SHOPS, rng.randint(1, 3))))
    facts = "{n} {S} St.|{C}|Tel. {t}|www.{w}.com|{d}.{m}.{Y} {H}:{i}|{S} Road {n}, {C}"
    for pattern in rng.sample(facts.split("|"), rng.randint(0, 3)):
        put_text(sheet, filled_in(rng, pattern), rng.choice(["center", "center", "left"]))
    if sheet.chance(0.4):
        wild_pairs(sheet, rng.randint(1, 3))
    items = sheet.names(ITEMS, MORE_ITEMS, count=rng.randint(2, 9))
    sums = sorted(sheet.names(SUMS, count=rng.randint(1, 4)), key=SUMS.index)
    prefix, suffix = rng.choice([("", "")] * 4 + [("$", ""), ("EUR ", ""), ("", " EUR")])
    prices = [prefix + (filled_in(rng, f"{rng.randint(1, 9)},~~~.~~") if sheet.chance(0.1)
                        else random_price(rng)) + suffix for _ in items + sums]
    pairs = list(zip(items + sums, prices))
    rows = [[sheet.cased(name), price] for name, price in pairs]
    aligns = ["left", "right"]
    if sheet.chance(0.3):
        times = rng.choice(["", "", " x", "x"])
        rows = [[f"{rng.randint(1, 12)}{times}" if i < len(items) else "", *row]
                for i, row in enumerate(rows)]
        aligns = ["left", "left", "right"]
    ask(sheet, pairs[:put_grid(sheet, rows, aligns, sums=len(sums))])
    if sheet.chance(0.4):
        wild_pairs(sheet, rng.randint(1, 3))
    if sheet.chance(0.6):
        put_text(sheet, filled_in(rng, rng.choice(PHRASES)), "center")


def wild_table(sheet):
    """A title, a table of two to five columns, and a line of text."""
    rng = sheet.rng
    if sheet.chance(0.5):
        put_title(sheet, title_text(rng))
    if sheet.chance(0.15):
        wild_pairs(sheet, 2)
    names = rng.choice([ITEMS, ITEMS + MORE_ITEMS, MORE_ITEMS, FIRST_NAMES, CITIES])
    items = sheet.names(names, count=rng.randint(2, 12))
    count = rng.choice([2, 2, 3, 3, 4, 5])
    columns = sheet.names(COLUMNS, MORE_COLUMNS, count=count)
    kinds = [rng.choice([random_price, random_short, random_short, wild_short]) for _ in columns]
    cells = [[kind(rng) for kind in kinds] for _ in items]
    one_word = not any(" " in text for texts in (items, columns, *cells) for text in texts)
    corner = "Item" if one_word and sheet.chance(0.5) else rng.choice(["", *CORNERS])
    for count in range(len(columns), 0, -1):
        rows = [[corner, *map(sheet.cased, columns[:count])]] + [
            [sheet.cased(item), *row[:count]] for item, row in zip(items, cells)]
        if column_spans(sheet, rows):
            break
    else:
        return wild_pairs(sheet, 4)
    aligns = ["left"] + [rng.choice(["left", "right", "center"])] * count
    drawn = put_grid(sheet, rows, aligns, header=True)
    sheet.page.questions += [
        (f"{sheet.asked(column)} of {sheet.asked(item)}", cell)
        for item, row in zip(items[:max(0, drawn - 1)], cells)
        for column, cell in zip(columns[:count], row)]
    if sheet.chance(0.25):
        put_text(sheet, wild_phrase(sheet))


def wild_short(rng):
    """A short value of one word or two."""
    patterns = ("{s}.~ kg|~~~ g|{n}%|{H}:{i}|^~~~|^-~~~|{C}|{f1}. {L}|${p}|{n} cm|yes|no|-|{w}|"
                "{d}.{m}.|{s}/{n}|{s}:{i} pm")
    return filled_in(rng, rng.choice(patterns.split("|")))


def wild_text(sheet):
    """Lines of text with punctuation, some larger, on the left or in the middle."""
    rng, align = sheet.rng, sheet.rng.choice(["left", "left", "center"])
    if sheet.chance(0.4):
        put_title(sheet, title_text(rng))
    while put_text(sheet, wild_phrase(sheet), align):
        if sheet.chance(0.05):
            draw_rule(sheet, sheet.area[0], sheet.area[2], sheet.area[1])


def wild_sign(sheet):
    """A large heading, lines of other sizes, and now and then hours or other pairs."""
    rng = sheet.rng
    put_title(sheet, rng.choice(HEADINGS + SIGNS).replace("_", " "), largest=2.2)
    for _ in range(rng.randint(0, 3)):
        put_text(sheet, wild_phrase(sheet), rng.choice(["center", "center", "left"]),
                 rng.choice([1.0, 1.0, 0.8, 1.3]))
    if sheet.chance(0.4):
        days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Mon-Fri Sat Sun Lunch"
        times = ("{s}:{i} - {h}:{i}", "{H}:{i} - {h}:{i}", "closed", "{s} am - {s} pm")
        hours = [(day, filled_in(rng, rng.choice(times)))
                 for day in sheet.names(days.split(), count=rng.randint(2, 6))]
        rows = [[sheet.cased(day) + sheet.colon, time] for day, time in hours]
        ask(sheet, hours[:put_grid(sheet, rows, ["left", rng.choice(["left", "right"])])])
    elif sheet.chance(0.3):
        wild_pairs(sheet, rng.randint(1, 4))


def wild_label(sheet):
    """A product's or parcel's label: a brand, a name, pairs, small print, a code."""
    rng = sheet.rng
    put_title(sheet, " ".join(rng.sample(SHOPS, rng.randint(1, 2))))
    if sheet.chance(0.6):
        put_title(sheet, rng.choice(ITEMS + MORE_ITEMS).replace("_", " "), 1.8)
    wild_pairs(sheet, rng.randint(2, 6))
    for _ in range(rng.randint(0, 3)):
        put_text(sheet, wild_phrase(sheet), rng.choice(["center", "left"]), rng.choice([1.0, 0.8]))


WILD = {"lines": wild_text, "form": wild_form, "receipt": wild_receipt, "table": wild_table,
        "letter": wild_text, "label": wild_label, "sign": wild_sign, "fields": wild_form}


def put_window(sheet):
    """A window's title bar and menu, over the whole page."""
    rng, (left, top, right, bottom) = sheet.rng, sheet.area
    fill = rng.choice(FILLS)
    sheet.area[0] += 4
    place = put_text(sheet, title_text(rng), rng.choice(["left", "center"]), ink=(255, 255, 255),
                     fill=fill, edges=(left - 4, right + 4))
    if not place:
        return
    if sheet.chance(0.6):
        x, cells = left + 4, []
        for word in rng.sample("File Edit View Tools Window Help Home Search".split(), 4):
            width = sheet.length(word)
            if x + width > right:
                break
            cells.append((word, x, x + width, "left"))
            x += width + sheet.size
        if put(sheet, cells):
            draw_rule(sheet, left - 4, right + 4, sheet.area[1], "solid")
    sheet.area[1] += 3


def put_buttons(sheet):
    """One to three buttons on a line."""
    texts = sheet.rng.sample("OK Cancel Save Close Next Back Submit Print Apply".split(),
                             sheet.rng.randint(1, 3))
    x, cells = sheet.area[0] + 10, []
    sheet.area[1] += 2
    for text in texts:
        width = sheet.length(text)
        if x + width + 10 < sheet.area[2]:
            cells.append((text, x, x + width, "left"))
        x += width + 28
    place = put(sheet, cells) if cells else None
    for _, x0, x1, _ in cells if place else ():
        sheet.draw.rounded_rectangle((x0 - 8, place[0], x1 + 8, place[1]), radius=4,
                                     outline=sheet.faint)


def put_frame(sheet):
    """A frame round what is still free: single, double, thick, or with round corners."""
    rng, (x0, y0, x1, y1) = sheet.rng, sheet.area
    style, inset = rng.choice(["single", "single", "double", "thick", "round"]), rng.randint(0, 3)
    box = (x0 + inset, y0 + inset, x1 - inset, y1 - inset)
    if style == "round":
        sheet.draw.rounded_rectangle(box, radius=rng.randint(4, 12), outline=sheet.faint)
    else:
        sheet.draw.rectangle(box, outline=sheet.faint, width=3 if style == "thick" else 1)
        if style == "double":
            sheet.draw.rectangle([a + b for a, b in zip(box, (3, 3, -3, -3))], outline=sheet.faint)
    inset += rng.randint(6, 10)
    sheet.area[:] = x0 + inset, y0 + inset, x1 - inset, y1 - inset


def render_mixed_page(rng, kind, width, height, wild, noise=0.03, wear=0.0, fonts=(None,)):
    """With probability `wild` a page that looks like other people's, with font sizes of its own,
    else one of pages.render_page, as pages of shapes always are; the other parameters are its."""
    if kind == "shapes" or not wild or rng.random() >= wild:
        return render_page(rng, kind, width, height, noise=noise, wear=wear, fonts=fonts)
    page, background = wild_page(rng, kind, width, height, wear, rng.choice(fonts))
    return worn(rng, page, background, noise, wear)


def wild_page(rng, kind, width, height, wear, file):
    """A page (see above) and the colour of its ground; the parameters are render_page's."""
    ground, ink = random_colors(rng)
    if kind in ("sign", "label") and rng.random() < 0.35:
        fill, light = rng.choice(FILLS), (255, 255, rng.choice([255, 200]))
        ground, ink = rng.choice([(fill, light), ((250, 215, 40), (10, 10, 10))])
    uneven = rng.randint(8, 30) if rng.random() < wear else 0
    page = Page(background_pixels(rng, width, height, ground, uneven))
    size = rng.randint(12, 16) if rng.random() < 0.6 or width < 192 else rng.randint(16, 24)
    if kind == "sign" and rng.random() < 0.4:
        size = rng.randint(16, max(16, min(32, height // 4, width // 8)))
    mixed = tuple((a + 2 * b) // 3 for a, b in zip(ground, ink))
    sheet = Sheet(page, ImageDraw.Draw(page.image), rng, file, size, ink, ground,
                  [2, 1, width - 3, height - 2], extra=rng.randint(3, 12),
                  space=rng.choice([1.0, rng.uniform(1.0, 1.5)]), as_printed=rng.random() < 0.75,
                  case=rng.choice(["natural"] * 5 + ["upper"] * 3 + ["lower"]),
                  colon=rng.choice([":", ":", ""]), rule=rng.choice(RULES),
                  faint=rng.choice([ink, mixed]))
    window = height >= 128 and width >= 192 and rng.random() < (0.4 if width >= 512 else 0.1)
    if window:
        put_window(sheet)
    elif rng.random() < 0.3 and min(width, height) >= 64:
        put_frame(sheet)
    margin = rng.randint(0, max(1, width // 16))
    sheet.area[0] += margin
    sheet.area[2] -= rng.choice([0, margin])
    sheet.area[1] += rng.randint(0, max(1, (sheet.area[3] - sheet.area[1]) // 6))
    WILD[kind](sheet)
    if window and rng.random() < 0.6:
        put_buttons(sheet)
    if not page.lines:                                  # nothing fitted: one short word always does
        page.lines = [[draw_word(sheet.draw, random_word(rng)[:3], 2, 0, load_font(12, file), ink)]]
    return page, ground
