"""The labelling guide: five attributes, five levels each, in our own words.

After the HelpSteer annotation guide (Wang et al., arXiv 2311.09528, appendix A; data set CC BY 4.0). Change
GUIDE_VERSION with any change of meaning: it is part of every journal key.
"""

from __future__ import annotations

GUIDE_VERSION = "helpsteer-2026-11"

# attribute -> (what it asks, the levels 0 to 4)
GUIDE: dict[str, tuple[str, tuple[str, str, str, str, str]]] = {
    "helpfulness": (
        "How useful is the answer as a whole for what the user wants?",
        (
            "Useless: it misses what the user wants altogether.",
            "Mostly beside the point; of use only in some small respect.",
            "Helps in part, but misses the aim of the request in some respect.",
            "Helps well and fits the request, though something could be better.",
            "Helps fully, just as the user meant it.",
        ),
    ),
    "correctness": (
        "Does the answer keep to the facts of image and question, invent nothing, and cover all that is asked?",
        (
            "Everything stated is wrong or invented, or the task is not attempted or mistaken for another.",
            "Something is right, but most is wrong, invented, misleading or missing; little success.",
            "Right and wrong mixed: details missing, small inventions or misleading parts, yet roughly on task.",
            "Right almost throughout: a little is missing, nothing is invented or misleading.",
            "Right throughout and complete: nothing needed is missing, nothing is false or misleading.",
        ),
    ),
    "coherence": (
        "Is the answer consistent with itself in content and style, and easy to follow, without repetition?",
        (
            "Cannot be understood; no message comes across.",
            "Hard to follow nearly everywhere: contradictions, confused logic or unclear language.",
            "Unclear in places: some contradictions, overlong sentences or confusing passages.",
            "Clear for the most part, with one or two places of rough flow or confusing wording.",
            "Clear and consistent throughout, easy to follow from start to end.",
        ),
    ),
    "complexity": (
        "How demanding is the language? This is a scale of level, not of quality.",
        (
            "Basic: a child or anyone with everyday command of the language follows it.",
            "Simple: plain words that ask for some schooling.",
            "Intermediate: someone who has finished secondary school follows it, a weak reader may not.",
            "Advanced: the vocabulary of someone who studies the subject.",
            "Expert: the technical language of a professional in the field.",
        ),
    ),
    "verbosity": (
        "How long is the answer, measured by what this question leads one to expect? Not a matter of quality.",
        (
            "Terse: nothing beyond what was asked.",
            "Rather short, though words or details could still go.",
            "Of usual length for the question.",
            "Rather long, though more could be said before it rambles.",
            "Wordy: notably long or full of extra detail.",
        ),
    ),
}


def guide_text() -> str:
    """The guide as the judge reads it."""
    lines = []
    for attribute, (asks, levels) in GUIDE.items():
        lines.append(f"{attribute.capitalize()}: {asks}")
        lines += [f"  {level} = {text}" for level, text in enumerate(levels)]
        lines.append("")
    return "\n".join(lines).rstrip()
