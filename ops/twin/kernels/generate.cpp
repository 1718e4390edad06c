// generate KERNEL COLUMN COLUMNS OUTPUT: what CANN's kernel build makes of one column of an operator's definition,
// around the source of its kernel, ops/<op>/op_kernel/<name>.cpp:
//
//   - DTYPE_<NAME>, ORIG_DTYPE_<NAME> and FORMAT_<NAME> for every input and output, in capitals
//   - the call of deep_ep_<name> with the addresses of all inputs, all outputs, their shapes where a shape depends on
//     the computation, the workspace without AscendC's own part in front, and the tiling
//
// Nothing else is defined for a kernel. A column that the definition lacks, or that is as one before, makes nothing.
// What CANN would not notice fails too: an argument that has another name than the parameter in its place.
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <regex>

#include "error.h"
#include "ops/kernel_library.h"
#include "register/op_def_registry.h"

namespace {

using deep_ep::Error;
using deep_ep::str;

struct Dtype {
  const char* name;
  const char* type;
};

Dtype dtype_of(ge::DataType dtype) {
  switch (dtype) {
    case ge::DT_FLOAT:
      return {"DT_FLOAT", "float"};
    case ge::DT_FLOAT16:
      return {"DT_FLOAT16", "half"};
    case ge::DT_BF16:
      return {"DT_BF16", "bfloat16_t"};
    case ge::DT_INT8:
      return {"DT_INT8", "int8_t"};
    case ge::DT_INT32:
      return {"DT_INT32", "int32_t"};
    case ge::DT_INT64:
      return {"DT_INT64", "int64_t"};
    default:
      throw Error(str("the twin has no ge::DataType ", static_cast<int>(dtype)));
  }
}

std::string in_capitals(std::string name) {
  for (char& c : name) c = static_cast<char>(std::toupper(c));
  return name;
}

std::vector<std::string> arguments_in(const std::string& source, const std::string& entry) {
  std::smatch found;
  if (!std::regex_search(source, found, std::regex("void\\s+" + entry + "\\s*\\(([^)]*)\\)")))
    throw Error(str("there is no function ", entry));
  const std::string list = found[1];
  static const std::regex argument("GM_ADDR\\s+(\\w+)");
  std::vector<std::string> names;
  for (std::sregex_iterator it(list.begin(), list.end(), argument), end; it != end; ++it) names.push_back((*it)[1]);
  return names;
}

std::string generate(const std::filesystem::path& kernel, size_t column, size_t columns) {
  const std::string name = kernel.stem(), entry = "deep_ep_" + name, type = deep_ep::definition_name(name);
  const auto& definitions = ops::OpDefFactory::definitions();
  const auto defined = definitions.find(type);
  if (defined == definitions.end()) throw Error(str("no operator ", type, " is defined"));
  const ops::OpDef& definition = defined->second;
  std::vector<ops::OpParamDef> params(definition.inputs().begin(), definition.inputs().end());
  params.insert(params.end(), definition.outputs().begin(), definition.outputs().end());

  std::ifstream file(kernel);
  const std::string source{std::istreambuf_iterator<char>(file), {}};
  const std::vector<std::string> arguments = arguments_in(source, entry);
  for (size_t i = 0; i < std::min(arguments.size(), params.size()); ++i)
    if (arguments[i] != params[i].name())
      throw Error(
          str("argument ", i, " of ", entry, " is ", arguments[i], ", and ", params[i].name(), " by the definition"));

  const size_t defined_columns = params.front().dtypes().size();
  if (defined_columns > columns)
    throw Error(str(type, " has ", defined_columns, " columns, and CMakeLists.txt compiles ", columns));
  if (column >= defined_columns) return str("// ", type, " has columns to ", defined_columns - 1, ".\n");
  const auto is_as = [&](size_t other) {
    return std::all_of(params.begin(), params.end(),
                       [&](const ops::OpParamDef& param) { return param.dtypes()[column] == param.dtypes()[other]; });
  };
  for (size_t other = 0; other < column; ++other)
    if (is_as(other)) return str("// Column ", column, " of ", type, " is as column ", other, ".\n");

  std::string macros, dtypes, call;
  for (size_t i = 0; i < params.size(); ++i) {
    const std::string param = in_capitals(params[i].name());
    const Dtype dtype = dtype_of(params[i].dtypes()[column]);
    if (params[i].formats()[column] != ge::FORMAT_ND) throw Error(str(params[i].name(), " has another format than ND"));
    macros += str("#define DTYPE_", param, ' ', dtype.type, "\n#define ORIG_DTYPE_", param, ' ', dtype.name,
                  "\n#define FORMAT_", param, " FORMAT_ND\n");
    dtypes += str(static_cast<int>(params[i].dtypes()[column]), ", ");
    call += str("arguments[", i, "], ");
  }
  size_t next = params.size();
  const bool has_shapes = std::any_of(definition.outputs().begin(), definition.outputs().end(),
                                      [](const ops::OpParamDef& output) { return output.shape_depends_on_compute(); });
  if (has_shapes) call += str("arguments[", next++, "], ");
  call += str("arguments[", next, "] + twin::kSystemWorkspaceBytes, arguments[", next + 1, ']');
  return str("// Generated from the definition of ", type, ".\n", macros, "#define ", entry, ' ', entry, '_', column,
             "\n#include ", kernel, "\n#include \"registry.h\"\n\nstatic const bool added = twin::kernels::add(\"",
             name, "\", {", dtypes, "}, [](uint8_t* const* arguments) { ", entry, '(', call, "); });\n");
}

}  // namespace

int main(int, char** argv) {
  const std::filesystem::path kernel = argv[1], output = argv[4];
  try {
    const std::string text = generate(kernel, std::stoul(argv[2]), std::stoul(argv[3]));
    std::ifstream old(output);
    if (std::string{std::istreambuf_iterator<char>(old), {}} != text) std::ofstream(output) << text;
    return 0;
  } catch (const std::exception& error) {
    std::cerr << kernel.filename().string() << ": " << error.what() << '\n';
    return 1;
  }
}
