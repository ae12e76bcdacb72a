"""``python -m eva02_kernels.testing``: check this installation against the float64 reference."""

from __future__ import annotations

import argparse

from eva02_kernels.testing.contract import smoke


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eva02_kernels.testing",
        description="Check every operator of this installation, forward and backward, against a float64 reference.",
    )
    parser.add_argument(
        "--backend", action="append", choices=["cpu", "eager"], help="backend to check (may repeat; default: all)"
    )
    parser.add_argument("--require", action="store_true", help="fail where a backend refuses to run")
    args = parser.parse_args()
    passed, refused = smoke(args.backend or ("cpu", "eager"))
    for line in dict.fromkeys(refused):
        print(f"refused  {line}")
    print(f"{passed} checks passed, {len(refused)} refused")
    if not passed or (args.require and refused):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
