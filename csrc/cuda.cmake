# The CUDA operators: libeva02_kernels_cuda.so for GPUs, or for the simulator of csrc/gpusim (EVA02_SIMULATOR=ON), which
# runs the same sources on the CPU: PTX for compute capability 8.0 alone, and its stand-in for the CUDA runtime.
#
# nvcc compiles *.cu (kernels and launchers, which know neither torch nor the C++ runtime), the C++ compiler the
# *_registration.cpp beside them.
set(EVA02_CUDA_ARCHITECTURES "80;90;100;120" CACHE STRING "compute capabilities with machine code; PTX is of the last")
option(EVA02_SIMULATOR "build the CUDA operators for the simulator, not for GPUs" OFF)
option(EVA02_CUDA "build the CUDA operators where there is an nvcc" OFF)

if(EVA02_SIMULATOR OR EVA02_CUDA)
  find_program(EVA02_NVCC nvcc)
  if(NOT EVA02_NVCC)
    message(FATAL_ERROR "no nvcc: install the CUDA toolkit or PyPI's nvidia-cuda-nvcc")
  endif()
  find_program(EVA02_CUDA_HOST_COMPILER NAMES g++ c++)
  execute_process(COMMAND ${EVA02_NVCC} --version OUTPUT_VARIABLE nvcc_version COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE ".*release ([0-9.]+).*" "\\1" nvcc_version "${nvcc_version}")
  message(STATUS "nvcc ${nvcc_version}: ${EVA02_NVCC}")

  if(EVA02_SIMULATOR)
    set(code -gencode arch=compute_80,code=compute_80 --compress-mode=none -lineinfo)
  else()
    set(code --compress-mode=size)
    foreach(capability ${EVA02_CUDA_ARCHITECTURES})
      list(APPEND code -gencode arch=compute_${capability},code=sm_${capability})
    endforeach()
    list(GET EVA02_CUDA_ARCHITECTURES -1 newest)
    list(APPEND code -gencode arch=compute_${newest},code=compute_${newest})
  endif()

  file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/*/*.cu)
  set(cuda_objects)
  set(cuda_registrations)
  foreach(source ${cuda_sources})
    get_filename_component(name ${source} NAME_WE)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o)
    file(RELATIVE_PATH shown ${CMAKE_CURRENT_SOURCE_DIR} ${source})
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${EVA02_NVCC} -std=c++20 -O3 -DEVA02_CUDA -I${CMAKE_CURRENT_SOURCE_DIR}/csrc ${code}
              -ccbin ${EVA02_CUDA_HOST_COMPILER} -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-fno-exceptions
              -MD -MF ${object}.d -c ${shown} -o ${object}
      DEPENDS ${source} DEPFILE ${object}.d WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
      COMMENT "nvcc ${shown}" VERBATIM COMMAND_EXPAND_LISTS)
    list(APPEND cuda_objects ${object})
    string(REPLACE "_cuda.cu" "_registration.cpp" registration ${source})
    if(NOT registration STREQUAL source)
      list(APPEND cuda_registrations ${registration})
    endif()
  endforeach()
  file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/cuda)

  add_library(eva02_kernels_cuda SHARED ${cuda_registrations} ${cuda_objects})
  target_include_directories(eva02_kernels_cuda PRIVATE csrc)
  target_include_directories(eva02_kernels_cuda SYSTEM PRIVATE ${EVA02_TORCH_DIR}/include)
  target_compile_definitions(eva02_kernels_cuda PRIVATE TORCH_TARGET_VERSION=0x020a000000000000 EVA02_CUDA)
  target_compile_options(eva02_kernels_cuda PRIVATE -Wall -Wextra)
  target_link_libraries(eva02_kernels_cuda PRIVATE ${EVA02_TORCH_DIR}/lib/libtorch_cpu.so)
  set_target_properties(eva02_kernels_cuda PROPERTIES SKIP_BUILD_RPATH ON)
  if(EVA02_SIMULATOR)
    set(seam ${CMAKE_CURRENT_SOURCE_DIR}/eva02_kernels/testing/gpusim)
    target_compile_definitions(eva02_kernels_cuda PRIVATE EVA02_SIMULATOR)
    target_link_libraries(eva02_kernels_cuda PRIVATE ${seam}/gpusim_seam.o ${seam}/libgpusim_cudart.a pthread)
    target_link_options(eva02_kernels_cuda PRIVATE -Wl,--as-needed -Wl,--exclude-libs,ALL)
    set_target_properties(eva02_kernels_cuda PROPERTIES CXX_VISIBILITY_PRESET hidden)
  else()
    get_filename_component(cuda_bin ${EVA02_NVCC} REALPATH)
    get_filename_component(cuda_bin ${cuda_bin} DIRECTORY)
    file(GLOB cuda_folders /usr/local/cuda*)
    find_library(EVA02_CUDART cudart_static REQUIRED HINTS ${cuda_bin}/.. ${cuda_folders} PATH_SUFFIXES lib64 lib)
    target_compile_definitions(eva02_kernels_cuda PRIVATE USE_CUDA)
    # The current stream is libtorch_cuda's to tell, which a CPU build of torch does not have: a library of that name is
    # linked in its place, and the real one is found when this is loaded.
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp "extern \"C\" void aoti_torch_get_current_cuda_stream() {}\n")
    add_library(torch_cuda SHARED ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp)
    set_target_properties(torch_cuda PROPERTIES CXX_VISIBILITY_PRESET default
                                                LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/link)
    target_link_libraries(eva02_kernels_cuda PRIVATE torch_cuda ${EVA02_CUDART} dl rt pthread)
    target_link_options(eva02_kernels_cuda PRIVATE -Wl,--as-needed -Wl,--gc-sections
                                                   -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/csrc/exports.map)
  endif()
endif()
