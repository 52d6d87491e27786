package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/module"
	"golang.org/x/mod/semver"
)

// prepare changes the tree in dir from development to the release of a version:
//   - the changelog has the version
//   - internal/release/api/released has the exported names
//   - each nested module requires the version
//   - a published module has no replace directive, because go install refuses a module that
//     has one, and its go.sum has the hashes of what it requires
func prepare(dir, version string, now time.Time) error {
	if err := module.Check(rootPath, version); err != nil {
		return err
	}
	if semver.Canonical(version) != version {
		return fmt.Errorf("version %s: want the form v1.2.3", version)
	}
	if err := releaseChangelog(dir, version, now); err != nil {
		return err
	}
	if err := releaseFaces(dir); err != nil {
		return err
	}
	files, err := output(dir, "git", "ls-files", "--", "*/go.mod")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(files) {
		if err := releaseModule(filepath.Join(dir, name), version); err != nil {
			return err
		}
	}
	return writeSums(dir, version)
}

// later returns an error if a version is not greater than the last one.
func later(version, last string) error {
	if semver.Compare(version, last) > 0 {
		return nil
	}
	return fmt.Errorf("version %s: not greater than the last one, %s", version, last)
}

// releaseModule makes a go.mod file require a version of the modules of this repository.
func releaseModule(name, version string) error {
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	f, err := modfile.Parse(name, text, nil)
	if err != nil {
		return err
	}
	for _, r := range f.Require {
		if ours(r.Mod.Path) {
			if err := f.AddRequire(r.Mod.Path, version); err != nil {
				return err
			}
		}
	}
	if slices.ContainsFunc(published, func(m folder) bool { return m.path() == f.Module.Mod.Path }) {
		for _, r := range f.Replace {
			if err := f.DropReplace(r.Old.Path, r.Old.Version); err != nil {
				return err
			}
		}
	}
	f.Cleanup()
	if text, err = f.Format(); err != nil {
		return err
	}
	return os.WriteFile(name, text, 0o666)
}
