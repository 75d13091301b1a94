"""Generate, criticise, refine: a judge looks at the pictures and says with which prompt it would try again (RationalRewards).

Each round paints the refined prompts of the best so far, one for each of its pictures and none twice; it ends when a round brought nothing
better, when the critic has nothing new to say, or when the budget does not hold another round. Everything that was tried stays in the table,
and all of it is judged by the user's own prompt: a critic may talk a picture into something else that looks better.
"""

from shared.rewriting import clean, fault
from trainer.rewrite.budget import Ledger, Way
from trainer.rewrite.judging import Judges
from trainer.rewrite.painter import Painter
from trainer.rewrite.search import Candidate, Found, Tell, paint, settle


def refine(
    found: Found,
    painter: Painter,
    judges: Judges,
    way: Way,
    ledger: Ledger,
    *,
    rounds: int,
    seed: int = 0,
    tell: Tell = lambda text: None,
) -> Found:
    """`found`, with up to `rounds` rounds more. The judges have a critic."""
    whole = Way(way.pictures, way.passes_T)
    for number in range(1, rounds + 1):
        parent = found.best
        texts, left_out = proposals(found, parent)
        if not texts:
            why = ", ".join(f"{count} {kind}" for kind, count in left_out.items()) or "the critic proposed none"
            found.notes.append(f"refining ended after {number - 1} rounds: no new prompt ({why})")
            return found
        fitting = most(ledger, whole, len(texts))
        if fitting == 0:
            found.notes.append(f"refining ended after {number - 1} rounds: the budget does not hold another prompt")
            return found
        new = [Candidate(text, "refined", round=number, parent=parent) for text in texts[:fitting]]
        tell(f"round {number}: painting {len(new)} refined prompts")
        found.candidates += new
        paint(found, new, painter, judges, whole, seed, tell)
        settle(found, judges)
        if found.best == parent:
            found.notes.append(f"refining ended after {number} rounds: nothing better came")
            return found
    return found


def proposals(found: Found, parent: int) -> tuple[list[str], dict[str, int]]:
    """What the critic would rather have, cleaned, in the order of the pictures, without what was tried already; and why others are left out."""
    known, left_out = {one.text for one in found.candidates}, dict[str, int]()
    out: list[str] = []
    for said in found.candidates[parent].texts_K:
        text = clean(said or "").text
        why = "again" if text in known else fault(found.prompt, text)
        if why is None:
            known.add(text)
            out.append(text)
        else:
            left_out[why] = left_out.get(why, 0) + 1
    return out, left_out


def most(ledger: Ledger, way: Way, wanted: int) -> int:
    """How many prompts can still be painted whole."""
    for count in range(wanted, 0, -1):
        passes, looks = way.whole(count)
        if ledger.allows(passes=passes, looks=looks):
            return count
    return 0
