# find_package(quire): quire::quire is the shared library, quire::quire_static the static one.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/quire-targets.cmake)
