"""`python -m kdcache`, which torchrun can start."""

from kdcache.cli import main

main()
