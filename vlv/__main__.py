from vlv.cli import main

raise SystemExit(main())
