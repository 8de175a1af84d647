"""What runs in the sandbox for `python`: each line of stdin is code as JSON, each line of stdout what came of it.

A script of its own, of the standard library; what is defined stays defined.
"""

import ast
import contextlib
import io
import json
import linecache
import os
import sys
import traceback

_LINES = 6  # of a traceback, at the end


def run(source, name, scope):
    """What code prints, the value of its last expression and the end of its traceback."""
    said = io.StringIO()
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            body = ast.parse(source, name).body
            last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), name, "exec"), scope)
            if (
                last is not None
                and (value := eval(compile(ast.Expression(last.value), name, "eval"), scope)) is not None
            ):
                print(repr(value))
        except BaseException as error:
            trace = error.__traceback__
            while trace and not trace.tb_frame.f_code.co_filename.startswith("<call"):  # ours
                trace = trace.tb_next
            lines = "".join(traceback.format_exception(type(error), error, trace)).splitlines()
            print(*lines[-_LINES:], sep="\n")
    return said.getvalue().rstrip()


def cut(text, longest):
    """Its beginning and its end, where it is longer."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def main(longest):
    """Until nobody asks any more."""
    lines, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1):  # the code's own
        os.dup2(nothing, descriptor)
    sys.stdin = io.StringIO()
    scope = {"__name__": "__main__"}
    answers.write(b"\n")
    answers.flush()
    for number, line in enumerate(lines, 1):
        said = run(json.loads(line), f"<call {number}>", scope)
        answers.write(json.dumps(cut(said, longest)).encode() + b"\n")
        answers.flush()
