"""transformers (5.23): every native architecture, and custom code where it is trusted."""

from upcycle.ir.spec import Plan
from upcycle.targets.native import NATIVE
from upcycle.targets.runtimes.support import CUSTOM, PLAIN, Config, Support, loads, refuses


def judge(target: str, config: Config, plan: Plan) -> Support:
    """Whether transformers loads it."""
    if target == PLAIN:
        return refuses("MODEL", "a plain module is no model of transformers; use upcycle.load")
    if target == CUSTOM:
        return loads("with trust_remote_code=True")
    first = plan.specs[0]
    narrow = any(width * 2 % 16 for width in (first.width, first.ffn.d_model))
    alone = 'loaded in a 16-bit type (not float32), only with experts_implementation="eager"'
    return loads(alone if narrow and NATIVE[target].grouped else None)
