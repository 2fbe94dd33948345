"""The metrics of the paper's seven benchmarks: functions of a prediction and the right answers.

    anls              DocVQA      similarity of characters, Biten et al. 2019, arXiv 1905.13648
    contains          OCRBench    an answer occurs in the prediction, Liu et al. 2023, 2305.07895
    vqa_accuracy      TextVQA,    agreement with ten people, Antol et al. 2015, arXiv 1505.00468
                      VQAv2
    relaxed_match     ChartQA     numbers may be 5 % off, Masry et al. 2022, arXiv 2203.10244
    choose, circular  MMBench     right under every rotation, Liu et al. 2023, arXiv 2307.06281
    cider             TextCaps    agreement of n-grams, Vedantam et al. 2015, arXiv 1411.5726

The details follow lmms-eval, with which these sets are usually run. A NOTE marks each difference.
"""

import math
import re
from collections import Counter


def edit_distance(a, b):
    """How many insertions, deletions and substitutions turn text a into text b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def anls(prediction, answers):
    """DocVQA's average normalised Levenshtein similarity, of one question: the best s over the
    answers, where s = 1 - distance / length of the longer text. Both texts are in lower case with
    single spaces. An s below 0.5 counts 0.

    NOTE(official): lmms-eval takes the lengths before it collapses spaces.
    """
    def plain(text):
        return " ".join(text.lower().split())
    s = max(1 - edit_distance(plain(prediction), plain(answer))
            / max(1, len(plain(prediction)), len(plain(answer))) for answer in answers)
    return s if s >= 0.5 else 0.0


def contains(prediction, answers, ignore_spaces=False):
    """OCRBench's score: 1 if any answer is a part of the prediction, both in lower case; else 0.

    ignore_spaces: for the formulas of HME100k, whose spaces mean nothing.
    NOTE(official): lmms-eval keeps HME100k's capitals.
    """
    def plain(text):
        text = text.lower().strip().replace("\n", " ")
        return text.replace(" ", "") if ignore_spaces else text
    return float(any(plain(answer) in plain(prediction) for answer in answers))


NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
you're you've""".split()
# "dont" -> "don't"; where there are several apostrophes, any one of them may be missing
CONTRACTIONS = {word[:i] + word[i + 1:]: word
                for word in CONTRACTED for i, c in enumerate(word) if c == "'"}


def normalise_answer(text):
    """An answer as EvalAI, the server of the VQA challenge, compares it: lower case, punctuation
    and articles removed, number words as digits, contractions with their apostrophe.

    A punctuation mark becomes a space. If any mark of its kind has a space beside it, all marks of
    its kind vanish instead. Commas and question marks always vanish, and so do periods unless a
    digit follows.
    """
    text = re.sub("[,?]", "", text.lower()).replace("'s", " 's")
    text = before = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in ";/[]\"{}()=+\\_-><@`!":
        spaced = mark + " " in before or " " + mark in before
        text = text.replace(mark, "" if spaced else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(prediction, answers):
    """Soft accuracy (TextVQA, VQAv2): the mean of ten scores. Each of the (ten) people's answers is
    left out in turn, and the prediction scores min(1, matches among the other nine / 3).

    NOTE(official): VQAv2's own script normalises nothing where all people gave the same answer.
    """
    given, said = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    matches = said.count(given)
    return sum(min(1, (matches - (answer == given)) / 3) for answer in said) / len(said)


def as_number(text):
    """"12.5" -> 12.5, "5%" -> 0.05, "many" -> None."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction, answer):
    """ChartQA's score: 1 if the prediction counts as right, else 0. If both are numbers, prediction
    p and target t != 0, it counts if |p - t| <= 0.05 |t|. Else it counts if the texts are equal
    up to capitals; nothing is stripped."""
    p, t = as_number(prediction), as_number(answer)
    if p is not None and t:
        return float(abs(p - t) / abs(t) <= 0.05)
    return float(prediction.lower() == answer.lower())


def choose(prediction, options):
    """The letter that a prediction chooses among MMBench's options {letter: text}: the only letter
    that it contains as a word ("B", "(B).", "B:"), else the only option whose text it contains,
    else None. In a prediction of more than three words a bare "A" is taken for the article.

    NOTE(official): where this gives None, a language model is asked, or a letter is drawn.
    """
    words = prediction.split()
    if len(words) > 3:
        words = [word for word in words if word != "A"]
    letters = {word.strip("().,:") for word in words} & set(options)
    if len(letters) != 1:
        letters = {letter for letter, text in options.items() if text.lower() in prediction.lower()}
    return letters.pop() if len(letters) == 1 else None


def circular(indices, right):
    """{question: 1 if the answers under all rotations of its options are right, else 0}. Rows whose
    indices are equal modulo a million are one question. right: for each row 1 or 0."""
    questions = {}
    for index, is_right in zip(indices, right):
        question = index % 1_000_000
        questions[question] = float(questions.get(question, 1) and is_right)
    return questions


def tokenize(caption):
    """Words in lower case without punctuation.

    NOTE(official): this approximates Stanford's PTBTokenizer (Java), which splits "don't" into "do"
    and "n't"."""
    return re.findall(r"\w+(?:[-.,:/]\w+)*|'\w+", caption.lower())


def ngram_counts(caption, longest=4):
    """For n = 1 ... longest, a Counter of the caption's n-grams."""
    words = tokenize(caption)
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, longest + 1)]


def cider(predictions, references):
    """CIDEr-D of each image (TextCaps), 10 at best. predictions: a caption for each image;
    references: for each image a list of captions.

    An n-gram's weight in a caption is tf * (ln N - ln max(1, df)): how often it occurs there, N
    images, df of them with the n-gram in a reference. For each n, a prediction with weights h and a
    reference with weights r agree by

        sum min(h, r) r / (|h| |r|) * exp(-d^2 / 72),   d the difference of their numbers of bigrams

    and the score is 10 times the mean over references and n = 1 ... 4. N-grams of all images
    weigh nothing, so that the score of a single image is 0.
    """
    counted = [[ngram_counts(caption) for caption in captions] for captions in references]
    df = Counter(gram for captions in counted
                 for gram in {g for counts in captions for n in counts for g in n})
    N = len(references)

    def weights(counts):
        return [{gram: tf * (math.log(N) - math.log(max(1, df[gram]))) for gram, tf in n.items()}
                for n in counts]

    def agreement(counts, reference):
        d, total = counts[1].total() - reference[1].total(), 0.0
        for h, r in zip(weights(counts), weights(reference)):
            lengths = math.hypot(*h.values()) * math.hypot(*r.values())
            if lengths > 0:
                total += sum(min(h[g], r[g]) * r[g] for g in h.keys() & r.keys()) / lengths
        return total / len(reference) * math.exp(-d ** 2 / 72)

    return [10 * sum(agreement(ngram_counts(caption), reference) for reference in captions)
            / len(captions) for caption, captions in zip(predictions, counted)]
