# For ROS 2 from PyPI only (pass as CMAKE_PROJECT_INCLUDE): the imported targets of those wheels name include folders of
# the machine that built them, e.g. of its Python, and CMake refuses a target with a folder that does not exist.
# Drops such folders from every imported target once the project has found its packages.
function(_drop_missing_includes)
  get_property(_targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(_target IN LISTS _targets)
    get_target_property(_folders ${_target} INTERFACE_INCLUDE_DIRECTORIES)
    if(_folders)
      set(_kept)
      foreach(_folder IN LISTS _folders)
        if(_folder MATCHES "^\\$<" OR EXISTS "${_folder}")
          list(APPEND _kept "${_folder}")
        endif()
      endforeach()
      set_target_properties(${_target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_kept}")
    endif()
  endforeach()
endfunction()
cmake_language(DEFER CALL _drop_missing_includes)
