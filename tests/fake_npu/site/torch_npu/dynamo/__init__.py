"""torch_npu.dynamo: makes torchair importable under its own name, as the real one does."""

import os
import sys

if os.environ.get("FAKE_NPU_TORCHAIR") != "absent":
    from torch_npu.dynamo import torchair

    sys.modules["torchair"] = torchair
