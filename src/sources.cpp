// Which sources this library was made of.

// DEEP_EP_SOURCES: their digest, from CMakeLists.txt.
extern "C" __attribute__((visibility("default"))) const char* deep_ep_sources() { return DEEP_EP_SOURCES; }
