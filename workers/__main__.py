"""`python -m workers`: the dispatcher."""

from workers.main import main

main()
