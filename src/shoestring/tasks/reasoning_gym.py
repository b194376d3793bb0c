"""Any generator of reasoning-gym, with its own scorer, held to right or wrong.

The kinds are its data sets. Difficulty is the level of a set's curriculum, from 1; sets without one have a single
level, and levels end where the curriculum does.

Seeds. reasoning-gym makes item i of a set from seed + i, so that "train seed 0, test seed 1" share all but one of
their items. Here every problem has a set of its own with a seed drawn from 2^31, and content, not seed, decides the
split: an item that comes up under two seeds is the same problem on the same side.

Scores. Its scorers hand out crumbs: part of a point for a gold inside prose, for well-formed rubbish, for nothing at
all. Here an answer is right when it scores 1 and is nothing but an answer: an echo of the question, a gold with other
text around it, and another script's digits are wrong whatever the scorer says. Sets whose scorer calls such things
right are compared exactly (EXACT). Some scorers evaluate the answer as Python: those see it only if it is written in
an alphabet in which nothing can be called (ALPHABETS). All run aside, with a time limit.

Left out: sets without a gold answer (boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour); codeio, which
runs programs that it brings along; scorers that call wrong answers right (game_of_life_halting: anything; puzzle24: 24
made of any numbers); sets whose items depend on the order of Python's sets, so that no seed repeats them
(isomorphic_strings, knight_swap, polynomial_multiplication, ransom_note, word_ladder); coin_flip, which has too few
problems to split; and jugs and sokoban, which search for seconds to minutes for one item.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from random import Random
from typing import Any

from shoestring.core.errors import UserError
from shoestring.core.nouns import Problem
from shoestring.tasks._aside import Aside, Late
from shoestring.tasks._draw import Draft, Split, draw

VERSION = "1.0"
NAMES = """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation
    binary_matrix bitwise_arithmetic caesar_cipher calendar_arithmetic chain_sum circuit_logic color_cube_rotation
    complex_arithmetic count_bits count_primes countdown course_schedule cryptarithm decimal_arithmetic
    decimal_chain_sum dice emoji_mystery family_relationships figlet_font fraction_simplification futoshiki
    game_of_life gcd group_anagrams gsm_symbolic intermediate_integration kakurasu knights_knaves largest_island lcm
    leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku
    modulo_grid n_queens needle_haystack number_filtering number_format number_sequence number_sorting
    palindrome_generation palindrome_partitioning path_star polynomial_equations pool_matrix power_function
    prime_factorization products quantum_lock rearc rectangle_count rotate_matrix rotten_oranges self_reference
    sentence_reordering shortest_path simple_equations simple_geometry simple_integration spell_backward
    spiral_matrix string_insertion string_manipulation string_splitting string_synthesis sudoku survo syllogism
    time_intervals tower_of_hanoi tsumego word_sequence_reversal word_sorting zebra_puzzles
"""
KINDS = tuple(NAMES.split())
EXACT = ("gsm_symbolic", "knights_knaves", "letter_jumble", "fraction_simplification")
LITERAL = re.compile(r"[\w\s\[\],'\"+-]*", re.ASCII)  # no brackets to call with, no operator to grow a number by
EXPRESSION = re.compile(
    r"(?!.*\*\*[\s(]*[\w.]+[\s)]*\*\*)"  # no power of a power
    r"(?!.*\*\*[\s(]*\d{3})"  # no large power
    r"(?:[\s+\-*/^(),=]|\d++(?:\.\d++)?+|(?<![\w.])(?:[A-Za-z]|sin|cos|tan|exp|log|sqrt|Integral)(?![\w.]))*+",
    re.ASCII | re.DOTALL,
)
ALPHABETS = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), LITERAL),
    **dict.fromkeys(("countdown", "intermediate_integration", "simple_integration"), EXPRESSION),
}
NOT_A_NUMBER = re.compile(r"\b(?:nan|inf|infinity)\b", re.IGNORECASE)
MAKE_SECONDS, SCORE_SECONDS = 120.0, 5.0  # a late item is an error, a late score is wrong
TRIES = 20  # some sets find no item for some seeds


def make(seed: int, difficulty: int, split: Split = "train", kind: str | None = None) -> Problem:
    """The problem of `seed`; raises UserError for an unknown kind or where reasoning-gym is not installed."""
    return draw("reasoning_gym", VERSION, MAKERS, seed, difficulty, split, kind)


def grade(problems: Sequence[Problem], answers: Sequence[str], *, sandbox: Any = None) -> list[bool]:
    """True where the answer is right by the set's own scorer and is nothing but an answer.

    Raises UserError where the installed reasoning-gym makes other problems than the one these are from.
    """
    return [_right(problem, answer) for problem, answer in zip(problems, answers, strict=True)]


def _right(problem: Problem, answer: object) -> bool:
    kind = problem.meta["kind"]
    if not isinstance(answer, str):
        return False
    text = answer.strip()
    if text == problem.gold:
        return True
    if not text or text == problem.prompt or kind in EXACT or len(text) > 4 * len(problem.gold) + 200:
        return False
    alphabet = ALPHABETS.get(kind)
    if alphabet is not EXPRESSION and problem.gold in text:
        return False
    if NOT_A_NUMBER.search(text) or any(letter.isdigit() and not letter.isascii() for letter in text):
        return False
    if alphabet is not None and not alphabet.fullmatch(text):
        return False
    if alphabet is EXPRESSION and not _letters(text) <= _letters(problem.gold):
        return False  # an integral's scorer takes a letter it does not know for a constant
    return _score(problem, text) >= 1.0


def _letters(text: str) -> set[str]:
    return {letter for letter in text if letter.isalpha()}


def _score(problem: Problem, text: str) -> float:
    meta = problem.meta
    judge, item = _judge(os.getpid()), (meta["kind"], meta["level"], meta["item_seed"])
    if judge("question", *item, seconds=MAKE_SECONDS) != problem.prompt:
        raise UserError(
            f"problem {problem.id} was made by reasoning-gym {meta['release']} and the one installed here makes "
            "another of it; install that release or make the problems again."
        )
    try:
        return float(judge("score", *item, text, seconds=SCORE_SECONDS))
    except (Late, ValueError):  # the scorer hangs or fails on what the answer says
        return 0.0


@cache
def _judge(owner: int) -> Aside:
    """One process aside for each process that grades: a fork must not share its parent's pipes."""
    return Aside("shoestring.tasks._gym:serve")


def _pick(kind: str, rng: Random, difficulty: int) -> Draft:
    try:
        from shoestring.tasks import _gym
    except ModuleNotFoundError as error:
        raise UserError(f'the package "{error.name}" is not installed; pip install "shoestring[tasks]".') from error
    for _ in range(TRIES):
        item_seed = rng.getrandbits(31)
        with suppress(RuntimeError, ValueError):
            gold, question = _gym.gold(kind, difficulty, item_seed), _gym.question(kind, difficulty, item_seed)
            return Draft(question, gold, None, {"item_seed": item_seed, "level": difficulty, "release": _gym.release()})
    raise UserError(
        f"reasoning-gym makes no item of {kind} at difficulty {difficulty}; lower it or choose another kind."
    )


MAKERS = {kind: partial(_pick, kind) for kind in KINDS}
