"""Where things are, and how a mistake looks."""
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"


def user_error(done):
    """The single line of a mistake: `error: ...` on stderr, nothing else there, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0][len("error: ") :]
