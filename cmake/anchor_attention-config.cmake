# Defines the imported target anchor_attention::anchor_attention: linking to it registers the operations
# anchor_attention::* with the dispatcher when the program starts. The LibTorch comes from the program's own
# find_package(Torch): one library serves every version from 2.10 on.
get_filename_component(ANCHOR_ATTENTION_LIBRARY
  "${CMAKE_CURRENT_LIST_DIR}/../../../libanchor_attention.so" ABSOLUTE)
if(NOT EXISTS "${ANCHOR_ATTENTION_LIBRARY}")
  set(anchor_attention_FOUND FALSE)
  set(anchor_attention_NOT_FOUND_MESSAGE "the library ${ANCHOR_ATTENTION_LIBRARY} is missing: reinstall the package")
  return()
endif()

if(NOT TARGET anchor_attention::anchor_attention)
  add_library(anchor_attention::library SHARED IMPORTED)
  set_target_properties(anchor_attention::library PROPERTIES
    IMPORTED_LOCATION "${ANCHOR_ATTENTION_LIBRARY}"
    IMPORTED_SONAME libanchor_attention.so)
  # A program calls the operations by name and needs no symbol of the library: --as-needed, the default of many
  # distributions, would drop it, and with it the registration.
  add_library(anchor_attention::anchor_attention INTERFACE IMPORTED)
  set_target_properties(anchor_attention::anchor_attention PROPERTIES
    INTERFACE_LINK_LIBRARIES "-Wl,--push-state,--no-as-needed;anchor_attention::library;-Wl,--pop-state")
endif()
set(anchor_attention_FOUND TRUE)
