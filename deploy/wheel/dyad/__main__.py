"""`python -m dyad` is `dyad`."""

from dyad.commands import launcher

launcher()
