import aclruntime
from front_end import READ, path_type


class InferSession(aclruntime.InferSession):
    def __init__(self, device_id, model_path, acl_json_path=None, debug=False, loop=1):
        path_type(ValueError, READ)(model_path)
        super().__init__(device_id, model_path)
