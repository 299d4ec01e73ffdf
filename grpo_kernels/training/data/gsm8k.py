"""GSM8K's way of writing a solution: calculations marked as ``<<48/2=24>>``, and a last line ``#### 72``.

Cobbe et al. (arXiv:2110.14168). Other data sets of word problems write theirs the same way.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Sequence
from fractions import Fraction

from grpo_kernels.training.tasks import Row

_FINAL = "####"
_MARK = re.compile(r"<<[^<>]*>>")
_STEP = re.compile(r"<<([^<>=]+)=([^<>=]+)>>(?:[\d,]*\.?\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def split_solution(text: str) -> tuple[str, str] | None:
    """The worked solution and the result of a text whose last line is ``#### result``; None for any other.

    The commas between thousands leave the result: 70,000 becomes 70000.
    """
    *solution, last = text.strip().split("\n")
    result = last.removeprefix(_FINAL).strip()
    if not last.startswith(_FINAL) or not result:
        return None
    return "\n".join(solution).rstrip(), _THOUSANDS.sub("", result)


def worked_completion(solution: str, answer: str) -> str:
    """A solution as a completion in the form of the format reward, without the marks of its calculations."""
    return f"<think>\n{_MARK.sub('', solution)}\n</think>\n<answer>{answer}</answer>"


def intermediates(row: Row) -> list[Row]:
    """Rows that ask for the results on the way to a marked solution's last line: for ``augmentation.vary_goal``.

    A line counts if it marks one calculation, plain arithmetic that comes to what is marked, a whole number. The new
    prompt shows the line with a blank for the result.
    """
    if not isinstance(row["prompt"], str) or not isinstance(row.get("solution"), str):
        return []
    lines = row["solution"].split("\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        result = _marked_result(line)
        if result is None:
            continue
        blank = _MARK.sub("", _STEP.sub("___", line)).strip()
        prompt = f"{row['prompt']}\n\nDo not answer this yet. Give only the number for the blank in this step: {blank}"
        completion = worked_completion("\n".join(lines[:number]), result)
        found.append({"prompt": prompt, "answer": result, "completion": completion})
    return found


def with_solutions(rows: Sequence[Row], where: str) -> list[Row]:
    """Rows with the result alone as their ``answer``, the worked text as ``solution``, and both as a ``completion``.

    A completion that a row has already stays.

    Args:
        rows: Rows whose answers all end in ``#### result``; or none of them does, and they come back as they are.
        where: Names the data set in an error.

    Raises:
        ValueError: The first row's answer has such an end and another's has not.
    """
    if not rows or not isinstance(rows[0]["answer"], str) or split_solution(rows[0]["answer"]) is None:
        return list(rows)
    found = []
    for number, row in enumerate(rows):
        parts = split_solution(str(row["answer"]))
        if parts is None:
            raise ValueError(
                f"{where}: the answer of row {number} must end in a line {_FINAL} and the result, as row 0's does, "
                f"got {str(row['answer'])[-60:]!r}"
            )
        solution, answer = parts
        completion = row.get("completion") or worked_completion(solution, answer)
        found.append({**row, "answer": answer, "solution": row.get("solution") or solution, "completion": completion})
    return found


def _marked_result(line: str) -> str | None:
    """What a line's only marked calculation comes to, where that is the whole number that is marked."""
    marks = _STEP.findall(line)
    if len(marks) != 1 or len(_MARK.findall(line)) != 1:
        return None
    calculation, marked = (_THOUSANDS.sub("", part.strip()) for part in marks[0])
    value = _value(calculation)
    return str(value) if value is not None and value.denominator == 1 and value == _value(marked) else None


def _value(expression: str) -> Fraction | None:
    """The exact value of numbers under the four operations; None for any other text, which marks nothing to check."""
    try:
        return _evaluated(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError(f"expected numbers under + - * /, got {ast.dump(node)}")
