# version_info.sh TOOLKIT FOLDER: writes version.info. Like CANN's own script it does not quote its arguments.
version=$(sed -n 's/^Version=//p' $1/compiler/version.info)
echo "custom_opp_compiler_version=$version" > $2/version.info
