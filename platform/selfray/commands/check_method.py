"""`selfray check-method`: the contract checks of `selfray.contract` on a user's own method."""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional

from selfray import plugins
from selfray.commands.flags import flag
from selfray.storage import one_line

if TYPE_CHECKING:
    from selfray.console import Console


@dataclass(frozen=True)
class CheckMethod:
    """Run the checks that selfray's methods pass on a method of your own package: gradients,
    teachers, micro-batches, bf16, exact resume, export. Takes a few minutes at most, on a CPU.
    $ selfray check-method my_package.barlow
    """

    interrupted: ClassVar[str] = "some checks did not run"

    module: Annotated[
        Positional[str],
        flag("Module that holds the method and its config, such as my_package.barlow.", "MODULE"),
    ]

    def run(self, console: "Console") -> int:
        console.live("loading torch")
        module = plugins.load(self.module)
        from selfray.contract import CHECKS, tiny
        from selfray.method import MethodConfig

        kinds = [
            kind
            for _, kind in inspect.getmembers(module, inspect.isclass)
            if issubclass(kind, MethodConfig) and kind.__module__ == self.module
        ]
        if len(kinds) != 1:
            found = ", ".join(kind.__name__ for kind in kinds) or "none"
            raise ValueError(
                f"{self.module} must define one subclass of selfray.method.MethodConfig, found: "
                f"{found}"
            )
        method, failed = tiny(kinds[0]), 0
        for check in CHECKS:
            words = check.__name__.replace("_", " ")
            console.live(words)
            try:
                check(method)
            except Exception as error:  # any error of the user's code fails the check
                failed += 1
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                console.say(f"FAILED  {words}: {kind}{one_line(error)}")
            else:
                console.say(f"ok      {words}")
        if failed:
            console.say(f"{self.module}: {failed} of {len(CHECKS)} checks failed")
            return 1
        console.say(f"{self.module}: all {len(CHECKS)} checks passed")
        return 0
