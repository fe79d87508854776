"""`python -m gkd.demo`: fetch and convert what the demo needs."""

from gkd.demo.models import main

if __name__ == "__main__":
    main()
