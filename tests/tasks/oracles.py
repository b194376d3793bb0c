"""Small independent oracles: they read a prompt and write down, in their own way, the steps and the answer."""

from __future__ import annotations

import re


def questions_sum(prompt: str) -> tuple[str, str]:
    pairs = re.findall(r"\b([a-z]) (\d)", prompt)
    totals = [sum(int(digit) for _, digit in pairs[: i + 1]) % 10 for i in range(len(pairs))]
    return " ".join(f"{label} {n} {t}" for (label, n), t in zip(pairs, totals, strict=True)), str(totals[-1])


def questions_story(prompt: str) -> tuple[str, str]:
    events = re.findall(r"([A-Z][a-z]+) (has|gives|takes) (\d)", prompt)
    signed = [int(n) * (-1 if verb == "takes" else 1) for _, verb, n in events]
    totals = [sum(signed[: i + 1]) for i in range(len(signed))]
    assert min(totals) >= 0 and len({name for name, _, _ in events}) == len(events)
    steps = [f"{' '.join(event)} {t % 10}" for event, t in zip(events, totals, strict=True)]
    return " ".join(steps), str(totals[-1] % 10)


def logic_liars(prompt: str) -> tuple[str, str]:
    claims = re.findall(r"([A-Z]) (honest|lies|agrees|denies)\b", prompt.split(" , ")[0])
    lies = [sum(word in ("lies", "denies") for _, word in claims[: i + 1]) for i in range(len(claims))]
    said = ["no" if count % 2 else "yes" for count in lies]
    assert prompt.endswith(f", is {claims[-1][0]} honest ?")
    return " ".join(f"{who} {word} {yes}" for (who, word), yes in zip(claims, said, strict=True)), said[-1]


def logic_parity(prompt: str) -> tuple[str, str]:
    pairs = re.findall(r"\b([a-z]) ([TF])\b", prompt)
    odd = [[v for _, v in pairs[: i + 1]].count("T") % 2 for i in range(len(pairs))]
    steps = [f"{label} {value} {'odd' if o else 'even'}" for (label, value), o in zip(pairs, odd, strict=True)]
    return " ".join(steps), "odd" if odd[-1] else "even"


def logic_order(prompt: str) -> tuple[str, str]:
    row = re.match(r"(.) (.) (.) ", prompt)
    assert row is not None
    places = dict(enumerate(row.groups(), start=1))
    steps = []
    for label, first, second in re.findall(r"([a-z]) swap (\d) (\d)", prompt):
        i, j = int(first), int(second)
        places = {**places, i: places[j], j: places[i]}
        steps.append(f"{label} swap {i} {j} " + " ".join(places[k] for k in sorted(places)))
    return " ".join(steps), " ".join(places[k] for k in sorted(places))


def programs_describe(prompt: str) -> tuple[str, str]:
    operations = re.findall(r"([a-z]) ([+*]) (\d)", prompt)

    def value(x: int, upto: int) -> int:
        for _, sign, n in operations[:upto]:
            x = x + int(n) if sign == "+" else x * int(n)
        return x

    steps = []
    for i, (label, sign, n) in enumerate(operations, start=1):
        b = value(0, i)
        steps.append(f"{label} {sign} {n} {(value(1, i) - b) % 10} {b % 10}")
    a, b = steps[-1].split()[-2:]
    return " ".join(steps), f"def f ( x ) : return ( {a} * x + {b} ) % 10"


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
