"""`python -m dyad` runs `dyad`."""

from dyad.commands import launcher

launcher()
