"""Small independent oracles: they read a prompt and write down, in their own way, the steps and the answer."""

from __future__ import annotations

import re


def questions_sum(prompt: str) -> tuple[str, str]:
    digits = [int(digit) for digit in re.findall(r"\d", prompt)]
    totals = [sum(digits[: i + 1]) % 10 for i in range(len(digits))]
    pairs = list(zip(digits, totals, strict=True))
    return " ".join([str(digits[0])] + [f"+ {digit} {total}" for digit, total in pairs[1:]]), str(totals[-1])


def questions_story(prompt: str) -> tuple[str, str]:
    events = [event.split()[-2:] for event in prompt.split(" . ")[:-1]]
    totals = [sum(int(n) * (-1 if verb == "loses" else 1) for verb, n in events[: i + 1]) for i in range(len(events))]
    assert min(totals) >= 0
    steps = [f"{verb} {n} {t % 10}" for (verb, n), t in zip(events, totals, strict=True)]
    steps[0] = events[0][1]
    return " . ".join(steps), str(totals[-1] % 10)


def logic_liars(prompt: str) -> tuple[str, str]:
    *claims, question = prompt.split(" . ")
    honest: dict[str, bool] = {}
    steps = []
    for claim in claims:
        words = claim.split()
        who, about = words[0], words[2] if words[1] == "says" else None
        says = words[-1] == "honest"
        honest[who] = says if about is None else honest[about] is says
        steps.append(" ".join([who, *([] if about is None else [words[-1]]), "yes" if honest[who] else "no"]))
    return " . ".join(steps), "yes" if honest[question.split()[1]] else "no"


def logic_xor(prompt: str) -> tuple[str, str]:
    words = prompt.removesuffix(" ?").split()
    falses = lambda upto: sum(1 for w in words[:upto] if w == "F") + sum(1 for w in words[:upto] if w == "xor")  # noqa: E731
    # T is 0 and F is 1 modulo two: "iff" adds them, "xor" adds them and one more.
    values = ["TF"[falses(i) % 2] for i in range(1, len(words) + 1, 2)]
    pairs = [f"{words[i]} {words[i + 1]} {values[(i + 1) // 2]}" for i in range(1, len(words), 2)]
    return " ".join([words[0], *pairs]), values[-1]


def logic_order(prompt: str) -> tuple[str, str]:
    row, *swaps, question = prompt.split(" . ")
    places = dict(enumerate(row.split(), start=1))
    steps = [row]
    for swap in swaps:
        i, j = map(int, swap.split()[1:])
        places = {**places, i: places[j], j: places[i]}
        steps.append(f"{i} {j} " + " ".join(places[k] for k in sorted(places)))
    return " . ".join(steps), places[("first", "second", "third").index(question.split()[0]) + 1]


def programs_describe(prompt: str) -> tuple[str, str]:
    operations = [part.split() for part in prompt.split(" , ")[1:-1]]

    def value(x: int, upto: int) -> int:
        for sign, n in operations[:upto]:
            x = x + int(n) if sign == "+" else x * int(n)
        return x

    steps = []
    for i, (sign, n) in enumerate(operations, start=1):
        b = value(0, i)
        steps.append(f"{sign} {n} {(value(1, i) - b) % 10} {b % 10}")
    a, b = steps[-1].split()[-2:]
    return " ; ".join(steps), f"def f ( x ) : return ( {a} * x + {b} ) % 10"


def programs_examples(prompt: str) -> tuple[str, str]:
    (x, y, here), (_, _, right), (_, _, up) = (
        tuple(int(word) for word in part.split() if word.isdigit()) for part in prompt.split(" . ")[:3]
    )
    a, b = (right - here) % 10, (up - here) % 10
    steps = [f"{here} {right} {a}", f"{here} {up} {b}", f"{x} {y} {here}"]
    value = here
    while x or y:
        slope = a if x else b
        x, y = (x - 1, y) if x else (x, y - 1)
        value = (value - slope) % 10
        steps.append(f"{x} {y} - {slope} {value}")
    return " . ".join(steps), f"def f ( x , y ) : return ( {a} * x + {b} * y + {value} ) % 10"
