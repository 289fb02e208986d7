"""`python -m shivelight`, and `accelerate launch -m shivelight train ...`."""

from shivelight.cli import main

main()
