"""With TRITON_INTERPRET=1 device code runs on the CPU, in this process: then the interpreter is mended first."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.device_code import interpreter

    interpreter.mend()
