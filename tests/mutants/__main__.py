"""`python -m mutants`"""

import sys

from mutants.runner import main

sys.exit(main())
