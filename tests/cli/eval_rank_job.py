"""One process of test_eval_processes.py: `eval_rank_job.py LAST EARLIER ...`, each the arguments of a `cppo eval`.

Earlier ones that begin with `rate` are the arguments of a `cppo data`.

The last evaluation fails in the second process.
"""

import json
import os
import sys

from cppo.cli import data as data_command
from cppo.cli import eval as eval_command
from cppo.cli.main import main
from cppo.errors import UserError
from cppo.evaluation import TransformersEngine


def fail(*args, **kwargs):
    raise UserError("the cable is out")


last, *earlier = map(json.loads, sys.argv[1:])
for argv in earlier:
    (data_command if argv[0] == "rate" else eval_command).run(argv)
if os.environ["RANK"] == "1":
    TransformersEngine.answer = fail
sys.exit(main(["eval", *last]))
