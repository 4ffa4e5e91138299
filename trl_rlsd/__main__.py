"""`python -m trl_rlsd`."""

from trl_rlsd.cli import main


raise SystemExit(main())
