"""Every private name of torch that fastdrop uses, and what fastdrop does with a torch that lacks one.

All other modules of `fastdrop.torch` import from here, and a test lets no other file use a private name. Each name is
looked up once, at import, so that calls pay nothing. A name that torch lacks is listed in `names.absent`, and a slower,
public way takes its place: without ``torch._C._dispatch_keys``, for example, `is_eager_dense` answers False and every
call goes by the ops. Where there is no public way, `names.require` raises an error that tells the missing name.

The names that most modules need can be imported from this package itself, the others from its modules.
"""

from .compilers import hide_from_dynamo
from .tensors import can_call_kernel, is_eager_dense, is_lazy, is_transformed, read_address

__all__ = ["can_call_kernel", "hide_from_dynamo", "is_eager_dense", "is_lazy", "is_transformed", "read_address"]
