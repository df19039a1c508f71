include(${CMAKE_CURRENT_LIST_DIR}/sources.cmake)
get_filename_component(SOURCE_ROOT ${CMAKE_CURRENT_LIST_DIR}/.. ABSOLUTE)

# Where nvcc's own programs and headers lie: nvcc itself may be a link or a script.
function(find_toolkit nvcc result)
  execute_process(COMMAND ${nvcc} --dryrun -cubin -arch=sm_80 -x cu /dev/null -o /dev/null
    ERROR_VARIABLE commands OUTPUT_QUIET)
  string(REGEX MATCH "TOP=([^\n]*)" ignored "${commands}")
  get_filename_component(toolkit "${CMAKE_MATCH_1}" REALPATH)
  set(${result} ${toolkit} PARENT_SCOPE)
endfunction()

# The assembler of a CUDA 12 toolkit makes machine code that drivers of CUDA 12 and newer run. The package index has it
# (nvidia-cuda-nvcc-cu12); it is taken where the Python that builds has it, else the toolkit's own.
function(find_ptxas toolkit result)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import nvidia.cuda_nvcc as package; print(next(iter(package.__path__)))"
    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  foreach(directory IN ITEMS "${package}" ${toolkit})
    if(directory AND EXISTS ${directory}/bin/ptxas)
      set(${result} ${directory}/bin/ptxas PARENT_SCOPE)
      return()
    endif()
  endforeach()
  message(FATAL_ERROR "no ptxas in ${toolkit}: set ANCHOR_ATTENTION_PTXAS")
endfunction()

# Adds the CUDA kernels to a target: device code as data, the host code that launches it through the driver, and the
# include directory of cuda.h. No library of CUDA is linked. `native` are architectures of machine code.
function(add_cuda_kernels target nvcc ptxas include_directory native keep_lines)
  set(script ${SOURCE_ROOT}/cmake/device_code.py)
  set(directory ${CMAKE_CURRENT_BINARY_DIR}/device_code)
  file(MAKE_DIRECTORY ${directory})
  file(GLOB sources CONFIGURE_DEPENDS ${SOURCE_ROOT}/csrc/kernels/cuda/*/instantiations/*.cu)
  if(NOT "90" IN_LIST native)
    list(FILTER sources EXCLUDE REGEX "/sm90/instantiations/")
  endif()
  set(launcher "")
  if(CMAKE_CUDA_COMPILER_LAUNCHER)
    set(launcher --launcher ${CMAKE_CUDA_COMPILER_LAUNCHER})
  elseif(DEFINED ENV{CMAKE_CUDA_COMPILER_LAUNCHER})
    set(launcher --launcher $ENV{CMAKE_CUDA_COMPILER_LAUNCHER})
  endif()
  set(stems "")
  set(made "")
  foreach(source IN LISTS sources)
    get_filename_component(name ${source} NAME_WE)
    set(compute 80)
    set(own_native ${native})
    if(source MATCHES "/sm90/instantiations/")
      # wgmma and setmaxnreg belong to one architecture.
      set(name sm90_${name})
      set(compute 90a)
      set(own_native 90a)
    endif()
    set(stem ${directory}/${name})
    set(outputs ${stem}.ptx)
    foreach(architecture IN LISTS own_native)
      list(APPEND outputs ${stem}.sm_${architecture}.cubin)
    endforeach()
    add_custom_command(
      OUTPUT ${outputs}
      COMMAND ${Python3_EXECUTABLE} ${script} compile --nvcc ${nvcc} --ptxas ${ptxas} ${launcher} --compute ${compute}
        --native ${own_native} $<$<BOOL:${keep_lines}>:--keep-lines> --output ${stem} ${source}
        -- -std=c++20 -lineinfo -I${SOURCE_ROOT}/csrc
      DEPENDS ${source} ${script}
      DEPFILE ${stem}.d
      COMMENT "Device code of ${name}"
      VERBATIM COMMAND_EXPAND_LISTS)
    list(APPEND stems ${stem})
    list(APPEND made ${outputs})
  endforeach()
  add_custom_command(
    OUTPUT ${directory}/device_code.cpp
    COMMAND ${Python3_EXECUTABLE} ${script} table --output ${directory}/device_code.cpp ${stems}
    DEPENDS ${made} ${script}
    COMMENT "Table of device code"
    VERBATIM)
  set_source_files_properties(${directory}/device_code.cpp PROPERTIES OBJECT_DEPENDS "${made}")
  list(TRANSFORM CUDA_HOST_SOURCES PREPEND ${SOURCE_ROOT}/ OUTPUT_VARIABLE host)
  list(TRANSFORM CUDA_PLAN_SOURCES PREPEND ${SOURCE_ROOT}/ OUTPUT_VARIABLE plans)
  # What the CPU kernels bring, too.
  list(REMOVE_ITEM plans ${SOURCE_ROOT}/csrc/key_ranges.cpp)
  target_sources(${target} PRIVATE ${host} ${plans} ${directory}/device_code.cpp)
  target_include_directories(${target} SYSTEM PRIVATE ${include_directory})
  target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
endfunction()
