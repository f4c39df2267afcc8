"""Reversing a word: "abc>" -> "cba". Easy for a model that reads letters, hard for a real one, whose tokens are pieces
of words.

    reward = LCS(answer, reference) / max(len(answer), len(reference))        (1)

LCS is the length of the longest common subsequence: letters kept in order, others skipped. Every letter put right pays,
every letter too many costs, and the reward is 1 only for the reference itself.

A word and its mirror image lie on the same side of the split: each is the other's answer.

Source: the reverse-text environment of prime-rl, which scores with difflib's ratio 2 M / (len a + len b), M being the
letters in matching blocks found greedily. Ours takes the true LCS and divides by the longer of the two.
"""

import random
import string

from nanogspo.tasks.base import Problem, first_distinct, is_held_out, refuse_count

SHORTEST = 3  # "a" reverses to itself and "ab" has two orders: nothing to learn there


class Reverse:
    name = "reverse"
    characters = string.ascii_lowercase + ">"

    def __init__(self, size: int = 6):
        """size  letters of the longest word; every length from 3 to size is equally likely"""
        if size < SHORTEST:
            raise ValueError(f"got size {size} for reverse, want {SHORTEST} or more letters; try 6")
        self.size = size

    def train_problem(self, n: int, seed: int) -> Problem:
        # no epochs: 26**6 words are too many to list, and each draw rolls its own dice
        return _problem(self._draw(f"{seed}/{n}", held_out=False))

    def held_out(self, count: int) -> list[Problem]:
        # half of the words of the longest length that the hash is expected to hold out
        refuse_count(count, 26**self.size // 20, f"words of up to {self.size} letters")
        words = first_distinct(lambda n: self._draw(f"held-out/{n}", held_out=True), count)
        return [_problem(word) for word in words]

    def reward(self, problem: Problem, answer_text: str) -> float:
        """Equation (1)."""
        answer = answer_text.strip()
        return longest_common_subsequence(answer, problem.answer) / max(len(answer), len(problem.answer))

    def exact(self, problem: Problem, answer_text: str) -> bool:
        return answer_text.strip() == problem.answer

    def _draw(self, stream: str, *, held_out: bool) -> str:
        dice = random.Random(stream)
        while True:  # 1.1 rolls on average for training, 10 for the exam
            word = "".join(dice.choices(string.ascii_lowercase, k=dice.randint(SHORTEST, self.size)))
            if is_held_out(min(word, word[::-1])) == held_out:
                return word


def longest_common_subsequence(a: str, b: str) -> int:
    """Length of the longest string that can be had from both a and b by deleting letters.

        best[i][j] = best[i-1][j-1] + 1                  if a[i] == b[j]
                     max(best[i-1][j], best[i][j-1])     otherwise

    Only the last row is kept; len(a) * len(b) steps, 6 ms for a chatty answer of 10,000 characters.
    """
    row = [0] * (len(b) + 1)  # row[j + 1] = best[i][j]
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], diagonal + 1 if x == y else max(row[j + 1], row[j])
    return row[-1]


def _problem(word: str) -> Problem:
    request = f"Reverse the text character by character and reply with the reversed text only.\n\nText: {word}"
    return Problem(f"{word}>", [{"role": "user", "content": request}], word[::-1])
