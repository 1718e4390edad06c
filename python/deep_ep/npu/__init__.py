"""deep_ep on Huawei's Ascend NPUs. Importing it needs neither torch_npu nor CANN."""
