// OP_ADD, and the registry that it fills, in the place of CANN's header of this name.
#pragma once

#include "register/op_def.h"

namespace ops {

class OpDefFactory {
 public:
  using Creator = OpDef (*)(const char* type);

  static int OpDefRegister(const char* type, Creator creator) {
    definitions().emplace(type, creator(type));
    return 0;
  }

  // By type. The shim's own.
  static std::map<std::string, OpDef>& definitions() {
    static std::map<std::string, OpDef> definitions;
    return definitions;
  }
};

}  // namespace ops

// The class is sliced to ops::OpDef, as by CANN.
#define OP_ADD(type)                  \
  static const int g_##type##_added = \
      ops::OpDefFactory::OpDefRegister(#type, [](const char* name) -> ops::OpDef { return type(name); })
