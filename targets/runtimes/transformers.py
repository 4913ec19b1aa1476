"""transformers (5.23): every native architecture, and custom code where it is trusted."""

from upcycle.ir.spec import Plan
from upcycle.targets.runtimes.support import CUSTOM, PLAIN, Config, Support, loads, refuses


def judge(target: str, config: Config, plan: Plan) -> Support:
    """Whether transformers loads it."""
    if target == PLAIN:
        return refuses("MODEL", "a plain module is no model of transformers; use upcycle.load")
    if target == CUSTOM:
        return loads("with trust_remote_code=True")
    return loads()
