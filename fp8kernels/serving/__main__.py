"""`python -m fp8kernels.serving FOLDER --prompt …`: generate text from an exported folder; `--json` for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from .generate import generate


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status. Bad folders and prompts are told in one line."""
    parser = argparse.ArgumentParser(prog="python -m fp8kernels.serving", description=__doc__)
    parser.add_argument("folder", help="a folder that fp8kernels.export or save_pretrained wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="more than 1: timed after a warm-up, the median counts")
    parser.add_argument("--json", action="store_true", help="print the run as one JSON object")
    given = parser.parse_args(arguments)
    try:
        run = generate(given.folder, given.prompt, new_tokens=given.new_tokens, repeats=given.repeats)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(run)) if given.json else f"{run.text}\n\n{run.tokens_per_second:.1f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
