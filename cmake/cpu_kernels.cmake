include(${CMAKE_CURRENT_LIST_DIR}/sources.cmake)
get_filename_component(SOURCE_ROOT ${CMAKE_CURRENT_LIST_DIR}/.. ABSOLUTE)

# Adds the CPU kernels to a target, their steps once per instruction set. What follows the names of the sets are options
# for the steps' compiler. Called where the target is made.
function(add_cpu_kernels target sets)
  set(vector_sets "")
  set(tile_sets "")
  foreach(name IN LISTS sets)
    if(DEFINED SOURCES_${name})
      set(sources ${SOURCES_${name}})
      string(APPEND tile_sets " apply(${name})")
    else()
      set(sources ${VECTOR_STEPS})
      string(APPEND vector_sets " apply(${name})")
    endif()
    list(TRANSFORM sources PREPEND ${SOURCE_ROOT}/)
    add_library(cpu_${name} OBJECT ${sources})
    target_compile_definitions(cpu_${name} PRIVATE ANCHOR_ATTENTION_ISA=${name})
    target_compile_options(cpu_${name} PRIVATE
      -Wall -Wextra ${ARGN} -fno-math-errno -fno-trapping-math -Wno-psabi ${FLAGS_${name}})
    # GCC 12 warns of its own AVX-512 header.
    target_compile_options(cpu_${name} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
    target_link_libraries(${target} PRIVATE cpu_${name})
  endforeach()
  set(sources ${CPU_SOURCES})
  list(TRANSFORM sources PREPEND ${SOURCE_ROOT}/)
  target_sources(${target} PRIVATE ${sources})
  set_source_files_properties(${SOURCE_ROOT}/csrc/kernels/cpu/dispatch.cpp PROPERTIES COMPILE_OPTIONS
    "-DANCHOR_ATTENTION_ISAS(apply)=${vector_sets};-DANCHOR_ATTENTION_TILE_ISAS(apply)=${tile_sets}")
endfunction()
