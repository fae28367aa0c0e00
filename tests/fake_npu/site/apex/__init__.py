"""A fake apex (Ascend's, or NVIDIA's with FAKE_APEX=nvidia): mixed precision that checks the order of calls."""

from apex import amp as amp
