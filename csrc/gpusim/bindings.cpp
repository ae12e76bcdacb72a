// The Python module eva02_kernels.testing.gpusim._core: programs, launches, and what they found.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "gpusim/outcome.h"

namespace py = pybind11;
using namespace gpusim;

namespace {

py::dict fault_record(const Program& p, const Fault& f) {
  py::dict d;
  describe(p, f, [&](const std::string& name, const auto& value) { d[py::str(name)] = value; });
  return d;
}

py::list unsupported_records(const Program& p) {
  py::list out;
  for (const auto& u : p.unsupported) out.append(py::make_tuple(u.line, u.text, u.reason));
  return out;
}

Options options_from(const py::dict& d) {
  Options o;
  o.seed = d["seed"].cast<u64>();
  o.order = d["order"].cast<std::string>();
  o.races = d["races"].cast<bool>();
  o.strict_races = d["strict_races"].cast<bool>();
  o.uninit = d["uninit"].cast<bool>();
  o.uninit_at_load = d["uninit_at_load"].cast<bool>();
  o.collect = d["collect"].cast<bool>();
  o.budget = d["budget"].cast<u64>();
  o.threads = d["threads"].cast<u32>();
  return o;
}

// regions: (base, size, host address, name, [(begin, end)] of fresh outputs, constant?, [(begin, end)])
py::dict launch(const Program& p, std::array<u32, 3> grid, std::array<u32, 3> block, const py::bytes& params,
                const py::list& regions, u64 dynamic_shared, u64 grid_barrier, const py::dict& options) {
  Launch run(p);
  run.grid = grid;
  run.block = block;
  const std::string bytes = params;
  run.params.assign(bytes.begin(), bytes.end());
  run.params.resize(std::max<size_t>(run.params.size(), p.param_bytes));
  run.dynamic_shared = dynamic_shared;
  run.grid_barrier = grid_barrier;
  run.options = options_from(options);
  for (const auto& item : regions) {
    const auto t = item.cast<py::tuple>();
    Region r;
    r.base = t[0].cast<u64>();
    r.size = t[1].cast<u64>();
    r.host = reinterpret_cast<u8*>(t[2].cast<u64>());
    r.name = t[3].cast<std::string>();
    const auto fresh = t[4].cast<std::vector<std::pair<u64, u64>>>();
    r.output = !fresh.empty();
    if (r.output) r.valid.assign(r.size, 1);
    for (const auto& [begin, end] : fresh) std::fill(r.valid.begin() + begin, r.valid.begin() + end, 0);
    r.constant = t[5].cast<bool>();
    r.views = t[6].cast<std::vector<std::pair<u64, u64>>>();
    run.regions.push_back(std::move(r));
  }
  {
    py::gil_scoped_release release;
    run.run();
  }
  py::list faults;
  for (const Fault& f : run.faults) faults.append(fault_record(p, f));
  py::list counters;
  describe_counters(run, [&](const auto&... fields) { counters.append(py::make_tuple(fields...)); });
  py::dict distinct;
  for (size_t i = 0; i < run.regions.size(); ++i) {
    const Region& r = run.regions[i];
    const Traffic t = traffic_of(run, i);
    std::string name = r.name;
    while (distinct.contains(py::str(name))) name += "'";
    distinct[py::str(name)] =
        py::make_tuple(t.loaded, t.stored, t.load_sectors, t.store_sectors, reinterpret_cast<u64>(r.host));
  }
  py::dict out;
  out["grid"] = run.grid;
  out["block"] = run.block;
  out["shared"] = run.dynamic_shared;
  out["faults"] = faults;
  out["counters"] = counters;
  out["distinct"] = distinct;
  out["instructions"] = run.instructions;
  out["output"] = run.output;
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::register_exception<PtxError>(m, "PtxError", PyExc_ValueError);
  py::class_<Program>(m, "Program")
      .def(py::init<const std::string&, const std::string&, u64>(), py::arg("text"), py::arg("entry"),
           py::arg("perturbation") = 0)
      .def_property_readonly("unsupported", &unsupported_records)
      .def_property_readonly("params",
                             [](const Program& p) {
                               std::vector<std::tuple<std::string, std::string, u64, u64>> out;
                               for (const auto& v : p.entry->params)
                                 out.emplace_back(v.name, v.type, p.param_offsets.at(v.name), v.bytes);
                               return out;
                             })
      .def_property_readonly("param_bytes", [](const Program& p) { return p.param_bytes; })
      .def_property_readonly("static_shared", [](const Program& p) { return p.static_shared; })
      .def_property_readonly("reqntid", [](const Program& p) { return p.entry->reqntid; })
      .def_property_readonly("target", [](const Program& p) { return p.module.target; })
      .def_property_readonly("grid_barrier", [](const Program& p) { return p.grid_barrier; })
      .def("constants",
           [](const Program&
                  p) {  // module variables in global and constant memory: name, bytes, initial values, constant
             py::list out;
             for (const auto& v : p.module.variables)
               if (!v.external && (v.space == Variable::kGlobal || v.space == Variable::kConst))
                 out.append(py::make_tuple(v.name, v.bytes,
                                           py::bytes(reinterpret_cast<const char*>(v.initial.data()), v.initial.size()),
                                           v.space == Variable::kConst));
             return out;
           });
  m.def("entries", [](const std::string& text) {
    std::vector<std::string> names;
    for (const auto& f : parse(text).functions)
      if (f.entry) names.push_back(f.name);
    return names;
  });
  m.def("launch", &launch);
}
