"""How methods look and read, the same in every plot and table: names, colours, markers, number formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's palette, which stays apart for colour-blind eyes; markers differ too, so that colour is never alone.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, GREY = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#B8A800",  # darkened: the palette's own yellow vanishes on white
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#8A8A8A",
)

DENSE = "dense"
FEWER_STEPS = "fewer-steps"


@dataclass(frozen=True)
class MethodStyle:
    """Colour, marker and line of one method."""

    colour: str
    marker: str
    line: str = "-"


KNOWN = {
    DENSE: MethodStyle(BLACK, "*"),
    "dense-finetuned": MethodStyle(BLACK, "P"),
    FEWER_STEPS: MethodStyle(BLACK, "s", "--"),
    f"{FEWER_STEPS}-placed": MethodStyle(BLACK, "D", ":"),
    f"{FEWER_STEPS}-tuned": MethodStyle(BLACK, "P", "-."),
    "tokens": MethodStyle(BLUE, "o"),
    "blocks": MethodStyle(GREEN, "^"),
    "blocks-refresh": MethodStyle(GREEN, "v"),
    "blocks-fitted": MethodStyle(BLUE, "D"),
    "blocks-tuned": MethodStyle(BLUE, "P"),
    "blocks-part": MethodStyle(SKY, "D"),
    "blocks-part-tuned": MethodStyle(SKY, "P"),
    "blocks-rear": MethodStyle(PURPLE, "d"),
    "blocks-rear-tuned": MethodStyle(PURPLE, "X"),
    "tokens+blocks": MethodStyle(PURPLE, "D"),
    "tokens+blocks-refresh": MethodStyle(PURPLE, "P"),
    "training-free": MethodStyle(VERMILION, "h"),
    "training-free-blocks": MethodStyle(VERMILION, "p"),
    "training-free-both": MethodStyle(VERMILION, "d"),
    "fixed": MethodStyle(SKY, "v"),
    "norm": MethodStyle(ORANGE, "<"),
    "random": MethodStyle(GREY, "X"),
}
OTHERS = (
    MethodStyle(YELLOW, ">"),
    MethodStyle(GREEN, "d"),
    MethodStyle(ORANGE, "p"),
    MethodStyle(PURPLE, "8"),
)
OURS = (
    "tokens", "blocks", "blocks-refresh", "blocks-fitted", "blocks-tuned", "blocks-part", "blocks-part-tuned",
    "blocks-rear", "blocks-rear-tuned",
    "tokens+blocks", "tokens+blocks-refresh", "training-free", "training-free-blocks", "training-free-both",
)  # fmt: skip


def base_method(method: str) -> str:
    """The method without what it adds: `tokens+reuse` -> `tokens`."""
    return method.removesuffix("+reuse")


def is_ours(method: str) -> bool:
    """Whether a method is Shivelight's own and not a peer, a reference or an ablation."""
    return base_method(method) in OURS


def takes_fewer_steps(method: str) -> bool:
    """Whether a method is the dense model with fewer steps, however they are chosen."""
    return method.startswith(FEWER_STEPS)


def method_styles(methods: list[str]) -> dict[str, MethodStyle]:
    """A style for each method, unknown ones in order of appearance, reuse as its method but dotted."""
    styles: dict[str, MethodStyle] = {}
    others = 0
    for method in dict.fromkeys(methods):
        base = base_method(method)
        style = KNOWN.get(base)
        if style is None:
            style = OTHERS[others % len(OTHERS)]
            others += 1
        styles[method] = style if base == method else MethodStyle(style.colour, style.marker, ":")
    return styles


def budget_label(row: Mapping[str, Any]) -> str:
    """What a row was allowed: `keep 0.6`, `12 steps`, or an empty string where nothing was bounded."""
    if takes_fewer_steps(row["method"]) and "steps" in row:
        return f"{row['steps']:g} steps"
    return ", ".join(f"{name} {value:g}" for name, value in row["budget"].items())


def row_label(row: Mapping[str, Any]) -> str:
    """A row's method and budget in one line."""
    return " ".join(part for part in (row["method"], budget_label(row)) if part)


def count(number: float) -> str:
    """A large count for people: `12.3 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
