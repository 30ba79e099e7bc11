"""``python -m data_prep.table``."""

from data_prep.table.command import main

raise SystemExit(main())
