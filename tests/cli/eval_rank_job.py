"""One process of test_eval_processes.py: `eval_rank_job.py LAST EARLIER ...`, each the arguments of a `cppo eval`.

The last evaluation fails in the second process.
"""

import json
import os
import sys

from cppo.cli import eval as eval_command
from cppo.cli.main import main
from cppo.errors import UserError
from cppo.evaluation import TransformersEngine


def fail(*args, **kwargs):
    raise UserError("the cable is out")


last, *earlier = map(json.loads, sys.argv[1:])
for argv in earlier:
    eval_command.run(argv)
if os.environ["RANK"] == "1":
    TransformersEngine.answer = fail
sys.exit(main(["eval", *last]))
