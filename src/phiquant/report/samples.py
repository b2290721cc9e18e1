"""Continuations on the page: the reference's beside a file's, and where they part."""

from ..eval.continuations import Candidate, Continuation, Parting, parting
from .figures import Report
from .markup import Markup, element, joined

__all__ = ["samples"]


def samples(report: Report) -> Markup:
    """All prompts, with the continuation of every file beside the reference's."""
    parts = []
    for index, prompt in enumerate(report.prompts):
        parts.append(element("h3", f"Prompt {index + 1}"))
        parts.append(element("blockquote", prompt))
        own = report.reference.samples[index]
        for file in report.files:
            other = file.samples[index]
            found = parting(own, other) if own.prompt == other.prompt else None
            common = None if found is None else found.tokens
            pair = element(
                "div",
                _said(f"{report.reference.path.name} (the reference)", own, common),
                _said(file.label, other, common),
                class_="pair",
            )
            parts.append(
                element("section", pair, element("p", _sentence(own, other, found, file.label)), class_="sample")
            )
    return joined(*parts)


def _said(name: str, one: Continuation, common: int | None) -> Markup:
    if common is None:
        text = joined(one.text)
    else:
        first, rest = "".join(one.pieces[common : common + 1]), "".join(one.pieces[common + 1 :])
        bare = first.lstrip()
        same = element("span", "".join(one.pieces[:common]) + first[: len(first) - len(bare)], class_="same")
        # What cannot be seen is named: spaces, line ends, an end token.
        text = joined(same, element("mark", bare or ("(blank)" if first else "(the end)")), rest)
    return element("div", element("h4", name), element("p", text), class_="said")


def _sentence(own: Continuation, other: Continuation, found: Parting | None, label: str) -> str:
    if own.prompt != other.prompt:
        return f"{label} has another chat template, so that the places cannot be compared."
    if found is None:
        return f"Both say the same, for {len(own.ids)} tokens."
    named = {candidate.token: candidate for candidate in found.candidates}
    left = _takes("the reference", named.get(found.left) if found.left is not None else None, label)
    right = _takes(label, named.get(found.right) if found.right is not None else None, label)
    return f"The first {found.tokens} tokens are the same; then {left}, and {right}."


def _takes(who: str, candidate: Candidate | None, label: str) -> str:
    if candidate is None:
        return f"{who} ends"
    return f"{who} has “{candidate.text}” (reference {_share(candidate.left)}, {label} {_share(candidate.right)})"


def _share(probability: float | None) -> str:
    return "rare" if probability is None else f"{100 * probability:.1f} %"
