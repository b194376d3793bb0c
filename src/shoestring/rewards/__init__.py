"""One reward a file: rollouts in, one number each out. `RANGE` bounds it; `JUDGES_CORRECTNESS` says what it claims.

A reward that needs to know what is right receives `grade`, one that needs a model a callable; none holds either.
"""
