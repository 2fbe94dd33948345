"""What a model writes by itself, in few passes with a draft of it (speculative decoding)."""

import torch


@torch.inference_mode()
def write(model, prompt, reading, draft, limit):
    """What the model itself writes, greedily, `limit` tokens at most: token ids (n,), without the
    end token. The score_heads.Reading holds all of it; it may hold the prompt up to its images from
    before.

    The draft, token ids (any), is that of speculative decoding (arXiv 2211.17192): a forward pass
    reads a piece of it after what is written so far, and as much of the piece is accepted as the
    model would have written. So the result is, up to rounding, that of decoding token by token, but
    a model that reads well needs few passes. The next piece is twice as long as what was accepted
    of the last.
    """
    T, ends, written = len(prompt.ids), model.processor.end_tokens, []
    draft = [token for token in draft if token not in ends]            # only the model ends it
    guess, read = draft[:32], reading.length
    while True:
        text = prompt.extended(written + guess)
        x = model.decoder.embed_tokens(text.ids[read:]) if read else model.embed(text)
        hidden = model.decoder(x, text.positions[:, read:], reading)
        chosen = model.logits(hidden[-1 - len(guess):]).argmax(-1).tolist()
        right = next((i for i, token in enumerate(guess) if token != chosen[i]), len(guess))
        written += chosen[:right + 1]
        read = T + len(written) - 1                                    # all but the last of them
        reading.cut(read)
        if written[-1] in ends or len(written) >= limit:
            return [token for token in written[:limit] if token not in ends]
        guess = continuation(draft, written)[:min(max(8, 2 * right), limit - len(written))]


def continuation(draft, written, n=3):
    """How the draft goes on after what is written: behind the place where the last n tokens stand
    in it, or fewer if it has no such place; of several the one nearest to where a transcript of
    that length should be."""
    for n in range(min(n, len(written)), 0, -1):
        last = written[-n:]
        ends = [i for i in range(n, len(draft) + 1) if draft[i - n:i] == last]
        if ends:
            return draft[min(ends, key=lambda i: abs(i - len(written))):]
    return draft[len(written):]
