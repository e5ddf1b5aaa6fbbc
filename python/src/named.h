// SPDX-License-Identifier: Apache-2.0
// Functions that say which argument is of a wrong type. nanobind alone lists the types of all, and
// names none.
//
//   nb::class_<T>(m, "T").def(named("f", &f), nb::arg("x"), nb::sig("def f(self, x: int) -> None"))
//
//   TypeError: f: x: expected int, got str
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace quire::python {

namespace nb = nanobind;

// What came for a parameter of type T. nanobind takes whatever comes, None too: a nb::sig tells
// callers what is right, and the function is called with that alone.
template <class T>
struct Given {
  nb::detail::make_caster<T> caster;
  nb::handle object;
  bool is_right;
};

// What a parameter takes, None apart.
template <class T>
struct Some {
  using type = T;
};
template <class T>
struct Some<std::optional<T>> : Some<T> {};
template <class T>
struct Some<nb::handle_t<T>> : Some<T> {};
template <class T>
using SomeOf = typename Some<nb::detail::intrinsic_t<T>>::type;

// As in a signature: "int", "float | None", "Sequence", "list[LayerGroup]".
template <class T>
std::string expected_of(const T*) {
  std::string text = nb::detail::make_caster<T>::Name.text;
  const size_t at = text.find('%');  // stands for a class of this module
  if (at == std::string::npos) return text;
  return text.replace(at, 1, nb::cast<std::string>(nb::type<SomeOf<T>>().attr("__name__")));
}
template <class T>
std::string expected_of(const std::vector<T>*) {
  return "list[" + expected_of(static_cast<const T*>(nullptr)) + "]";
}

template <class T>
void check_given(const std::string& argument, const Given<T>& given) {
  if (given.is_right) return;
  using Plain = nb::detail::intrinsic_t<T>;
  const std::string expected =
      argument + ": expected " + expected_of(static_cast<const Plain*>(nullptr));
  constexpr bool is_int = std::is_integral_v<SomeOf<T>> && !std::is_same_v<SomeOf<T>, bool>;
  if (is_int && PyLong_CheckExact(given.object.ptr()))
    throw nb::value_error((expected + " of fewer bits, got one out of range").c_str());
  const nb::handle type = given.object.type();
  throw nb::type_error(
      (expected + ", got " + nb::cast<std::string>(type.attr("__name__"))).c_str());
}

// f, called with arguments that are all right. `extra` names them, but for the `self` of a method.
template <class F, class Result, class... Args, class... Extra>
auto refuse_by_name(const std::string& function, bool is_method, F f, Result (*)(Args...),
                    const Extra&... extra) {
  static_assert((std::is_same_v<Extra, nb::sig> || ...), "nb::sig says where None is right");
  auto* const names = new std::vector<std::string>(is_method, function);  // for good, as f is bound
  const auto add = [&](const auto& item) {
    if constexpr (requires { item.name_; }) names->push_back(function + ": " + item.name_);
  };
  (add(extra), ...);
  return [f, names](Given<Args>&... args) -> Result {
    if (!(args.is_right && ...)) [[unlikely]] {
      const std::string* name = names->data();
      (check_given(*name++, args), ...);
    }
    return f(args.caster.operator nb::detail::cast_t<Args>()...);
  };
}

// For nb::class_::def(), in the place of a name and a function or lambda.
template <class F>
class named : public nb::def_visitor<named<F>> {
 public:
  named(const char* name, F f) : name_(name), f_(f) {}

  template <class Class, class... Extra>
  void execute(Class& type, const Extra&... extra) {
    const std::string name = name_;
    const auto function = name == "__init__" ? nb::cast<std::string>(type.attr("__name__")) : name;
    type.def(name_, refuse_by_name(function, true, f_, +f_, extra...), extra...);
  }

 private:
  const char* name_;
  F f_;
};

// The same of a function in a module, or of a static method.
template <class F, class... Extra>
void def_named(nb::handle scope, const char* name, F f, const Extra&... extra) {
  nb::cpp_function_def(refuse_by_name(name, false, f, +f, extra...), nb::scope(scope),
                       nb::name(name), extra...);
}

}  // namespace quire::python

namespace nanobind::detail {

template <class T>
struct type_caster<quire::python::Given<T>> {
  using Value = quire::python::Given<T>;
  static constexpr auto Name = make_caster<T>::Name;
  template <class>
  using Cast = Value&;

  // Of several overloads one that fits without a conversion comes first, and `self` gets none.
  bool from_python(handle object, uint32_t flags, cleanup_list* cleanup) noexcept {
    value.object = object;
    value.is_right = value.caster.from_python(object, flags | none_disallowed_flag<T>, cleanup);
    return value.is_right || (flags & cast_flags::convert) != 0;
  }
  explicit operator Value&() { return value; }

  Value value;
};
template <class T>
struct has_arg_defaults<quire::python::Given<T>> : std::true_type {};
template <class T>
struct remove_opt_mono<quire::python::Given<T>> : remove_opt_mono<intrinsic_t<T>> {};

}  // namespace nanobind::detail
