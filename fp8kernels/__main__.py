"""python -m fp8kernels"""

from .cli import main

if __name__ == "__main__":
    main()
