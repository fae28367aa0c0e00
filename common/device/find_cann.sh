#!/usr/bin/env bash
# Prints the path of CANN's set_env.sh, or nothing. CANN 8.5 and 9 install to cann/, 6 to 8.3 to ascend-toolkit/, the
# package for training alone to nnae/; below the folder that the user or the installer recorded, /usr/local (default of
# root) or the home folder (default of other users).
recorded=$(sed -n 's/^[A-Za-z_]*Install_Path[A-Za-z_]*=//p' /etc/Ascend/ascend_cann_install.info 2>/dev/null | head -n 1)
for root in "${ASCEND_INSTALL_PATH:-}" "$recorded" /usr/local/Ascend "${HOME:-}/Ascend"; do
  for product in cann ascend-toolkit nnae; do
    if [[ -n $root && -f $root/$product/set_env.sh ]]; then
      echo "$root/$product/set_env.sh"
      exit
    fi
  done
done
