from aclruntime import InferSession as InferSession
