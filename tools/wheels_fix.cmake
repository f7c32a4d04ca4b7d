# For ROS 2 from PyPI only (pass as CMAKE_PROJECT_INCLUDE). Two things that CMake refuses there, mended once the project
# has made its targets:
# - imported targets of the wheels name include folders of the machine that built them, which do not exist here;
# - with the virtual environment inside the source tree, our own exported targets name its numpy, and a path in the
#   source tree must not be exported. It is of use to our build only.
function(_mend_include_folders)
  get_property(_imported DIRECTORY PROPERTY IMPORTED_TARGETS)
  get_property(_own DIRECTORY PROPERTY BUILDSYSTEM_TARGETS)
  foreach(_target IN LISTS _imported _own)
    get_target_property(_folders ${_target} INTERFACE_INCLUDE_DIRECTORIES)
    if(NOT _folders)
      continue()
    endif()
    set(_mended)
    foreach(_folder IN LISTS _folders)
      if(_folder MATCHES "^\\$<")
        list(APPEND _mended "${_folder}")
      elseif(_target IN_LIST _own AND _folder MATCHES "/site-packages/")
        list(APPEND _mended "$<BUILD_INTERFACE:${_folder}>")
      elseif(EXISTS "${_folder}")
        list(APPEND _mended "${_folder}")
      endif()
    endforeach()
    set_target_properties(${_target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_mended}")
  endforeach()
endfunction()
cmake_language(DEFER CALL _mend_include_folders)
